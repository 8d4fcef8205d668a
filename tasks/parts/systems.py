"""Systems whose memory or view params.yaml leaves out: they are run as their weights were trained."""

from dataclasses import replace

from tasks.params.schema import Params, System


def as_trained(params: Params, system: System) -> System:
    """Return the system with its memory or its view filled in from the stage that trained its weights."""
    if system.memory or system.view:
        return system
    memories = {"causal_init": params.causal_init.memory, "stage1": params.stage1.memory, "stage2": params.stage2.memory}
    if system.weights in memories:
        return system.model_copy(update={"memory": memories[system.weights]})
    view = params.teacher.view if system.weights == "teacher" else replace(params.teacher.view, context="none")  # base knows no past
    return system.model_copy(update={"view": view})
