"""Print what the app consists of, ask every node for its partition, and fail if told to."""

import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    print(f"label: {config['label']}")
    root = Path(__file__).parents[1]
    print(
        "files:", *sorted(str(path.relative_to(root)) for path in root.rglob("*.*") if path.suffix != ".pyc")
    )
    while len(list(grid.get_node_ids())) < int(config["num-nodes"]):
        time.sleep(0.05)
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = [reply.content.config_records["node"] for reply in grid.send_and_receive(messages)]
    for reply in sorted(replies, key=lambda r: int(str(r["partition-id"]))):
        print(f"node: {reply['partition-id']} of {reply['num-partitions']}, label {reply['label']}")
    time.sleep(float(config["seconds"]))
    if config["fail"]:
        raise RuntimeError("told to fail")
