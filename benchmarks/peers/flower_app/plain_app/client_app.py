"""One client a SuperNode."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from plain_app.task import load_data, make_net
from plain_app.task import test as test_fn
from plain_app.task import train as train_fn

app = ClientApp()


def _device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on the client's own rows."""
    config = context.run_config
    net = make_net(str(config["shards"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    x, y = load_data(int(context.node_config["partition-id"]), str(config["shards"]))
    steps, batch, lr = int(config["local-steps"]), int(config["batch-size"]), float(config["lr"])
    loss = train_fn(net, x, y, steps, batch, lr, _device())
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(x)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on the client's own rows."""
    config = context.run_config
    net = make_net(str(config["shards"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    x, y = load_data(int(context.node_config["partition-id"]), str(config["shards"]))
    loss, accuracy = test_fn(net, x, y, _device())
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(x)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
