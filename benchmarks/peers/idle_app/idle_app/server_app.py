"""Send rounds of messages and print when each round was complete; fedsim's loop looks for replies every 50 ms."""

import json
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsim.grid import exchange, wait_for_nodes

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Exchange messages with all nodes, round after round."""
    config = context.run_config
    nodes = wait_for_nodes(grid, int(config["nodes"]), timeout=120.0)
    ends = []
    for _ in range(int(config["rounds"])):
        content = RecordDict()
        if config["numbers"]:
            x = np.random.default_rng().standard_normal(int(config["numbers"]), dtype=np.float32)
            content["arrays"] = ArrayRecord({"x": Array(x)})
        replies = list(exchange(grid, [Message(content, node, "train") for node in nodes], timeout=120.0))
        assert len(replies) == len(nodes)
        assert not any(reply.has_error() for _, reply in replies)
        ends.append(time.monotonic())
    print("ends:", json.dumps(ends), flush=True)
