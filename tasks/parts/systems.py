"""Systems whose memory or view params.yaml leaves out: they are run as their weights were trained."""

from __future__ import annotations

from dataclasses import replace

from tasks.params.schema import Params, System


def as_trained(params: Params, system: System) -> System:
    """Return the system with its memory or its view filled in from the stage that trained its weights."""
    if system.memory or system.view:
        return system
    match system.weights:
        case "causal_init":
            return system.model_copy(update={"memory": params.causal_init.memory})
        case "stage1":
            return system.model_copy(update={"memory": params.stage1.memory})
        case "stage2":
            return system.model_copy(update={"memory": params.stage2.memory})
        case "teacher":
            return system.model_copy(update={"view": params.teacher.view})
    # the base model knows no past
    return system.model_copy(update={"view": replace(params.teacher.view, context="none")})
