"""How long clips must be for the stages that read them, in latent frames, so that no accepted clip stops a stage hours later."""

from dataclasses import dataclass

from tasks.params.schema import Params


@dataclass(frozen=True)
class NeededLengths:
    """Latent frames, each under the parameters that ask for them."""

    every: tuple[str, int]  # training clip
    longest: tuple[str, int]  # at least one training clip
    heldout: tuple[str, int]  # every held-out clip


def list_needed_lengths(params: Params) -> NeededLengths:
    """Find the longest that any stage asks for."""
    view, chunk = params.teacher.view, params.stage2.rollout.chunk
    shortest = -(-params.teacher.shortest // view.chunk) * view.chunk if view.context == "memory" else params.teacher.shortest
    longest = {
        "base.window": params.base.window,
        "teacher.shortest + teacher.target": shortest + params.teacher.target,
        "causal_init.longest + causal_init.frames": params.causal_init.longest + params.causal_init.frames,
    }
    if params.stage2.rollout.begin != "own":
        longest["stage2.horizon.longest - stage2.rollout.window"] = params.stage2.horizon.longest - params.stage2.rollout.window
    heldout = {"generate.prefix and a chunk": params.generate.prefix + chunk}
    if params.samples.teacher.every:
        heldout["samples.teacher.prefix"] = params.samples.teacher.prefix
    most, held = (max(needs.items(), key=lambda need: need[1]) for needs in (longest, heldout))
    return NeededLengths(("base.window", params.base.window), most, held)
