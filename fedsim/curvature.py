"""What strategies ask about the Hessian of the training loss, answered on the server."""

from __future__ import annotations

from fedsim.carriers import Carrier
from fedsim.experiment import BadInput, Experiment
from fedsim.federation import Federation
from fedsim.probes.disagreement import training_loss
from strategies import Broadcast, State
from strategies.basis import like_model


def answer(
    experiment: Experiment, federation: Federation, carrier: Carrier, state: State, broadcast: Broadcast
) -> tuple[State, Broadcast]:
    """Hand the strategy the dominant eigenvectors that it asks for, at the model that it sends.

    Parameters
    ----------
    experiment : Experiment
        The run.
    federation : Federation
        Its data and model.
    carrier : Carrier
        Where the workers live.
    state, broadcast : dict of str to Tree
        After `strategies.Rule.init` or a merge.

    Returns
    -------
    tuple of State and Broadcast
        After `strategies.Rule.learn`; as they were if it asks for none.

    Raises
    ------
    BadInput
        If the workers' data are not known here.
    """
    strategy = experiment.parts.strategy
    k = strategy.curvature(state)
    if not k:
        return state, broadcast
    if not carrier.knows_data:
        raise BadInput(
            f"strategy = {experiment.strategy!r}: needs the training loss on the server, but these nodes train on "
            "data of their own"
        )
    from fedsim.analysis.hessian import dominant

    model = broadcast["model"]
    pairs = dominant(training_loss(federation), model, k, seed=experiment.seed)
    return strategy.learn(state, broadcast, like_model(pairs.vectors, model))
