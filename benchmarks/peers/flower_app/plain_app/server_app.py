"""Flower's FedAvg; prints when each round ends."""

import time

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from plain_app.task import initial_parameters

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for all SuperNodes, train, and write the model."""
    config = context.run_config
    nodes = int(config["num-nodes"])
    # The strategy samples before it waits for nodes: without this, round 1 would train a few clients only.
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.05)

    def clock(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        print(f"round {server_round} ended at {time.monotonic():.6f}", flush=True)
        return MetricRecord({})

    strategy = FedAvg(
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_available_nodes=nodes,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_parameters(str(config["shards"]))),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=clock,
    )
    save_file(result.arrays.to_torch_state_dict(), str(config["result"]))
