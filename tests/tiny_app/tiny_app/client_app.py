"""Tell the partition, and nothing else."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    node = ConfigRecord({**context.node_config, "label": context.run_config["label"]})
    return Message(RecordDict({"node": node}), reply_to=message)
