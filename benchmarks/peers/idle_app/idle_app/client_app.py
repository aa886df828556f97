"""Reply at once, with as many random numbers as the run wants; nothing is decoded and PyTorch is not imported."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Reply."""
    content = RecordDict()
    numbers = int(context.run_config["numbers"])
    if numbers:  # random, as Flower sends equal bytes only once
        x = np.random.default_rng().standard_normal(numbers, dtype=np.float32)
        content["arrays"] = ArrayRecord({"x": Array(x)})
    return Message(content, reply_to=message)
