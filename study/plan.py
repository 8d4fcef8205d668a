"""study/plan.yaml as types: arms, groups of cells, metrics, gate, exclusion rules and contrasts, checked before anything runs.

A cell is an arm trained with one seed in one set of worlds, and measured on clips that no training and no choice of settings has seen.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from tasks.params.load import explain_first_error
from tasks.params.nightly import Section
from tasks.params.yaml_file import Refused, read_yaml

FILE = Path(__file__).parent / "plan.yaml"
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Changes = dict[str, Any]  # sections of params.yaml that differ, as deep as needed
Positive = Annotated[int, Field(ge=1)]


class WorldSet(Section):
    """A set of worlds: the seeds of three sets of clips, and how its parameters differ from the profile's."""

    training: Positive
    validation: Positive  # clips on which settings may be chosen
    reporting: Positive  # clips on which claims are tested
    params: Changes


class Arm(Section):
    """What one student is: how it was trained, and how it generates. Everything that is not stated is as in the profile."""

    student: Literal["stage2", "stage1", "teacher"] | None = None  # what trains it; None: `weights` names another arm's student
    weights: Name | None = None
    teacher: Name = "context"
    init: Name = "usual"
    scores: Literal["teacher", "base"] = "teacher"  # the weights that both scores of stage 2 begin with
    params: Changes = Field(default_factory=dict)
    updates: PositiveInt | None = None  # of the student, instead of the profile's
    memory: Changes | None = None  # that generation changes in the memory it was trained with
    frames: PositiveInt | None = None  # latent frames of its videos, instead of the plan's

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.student is None) == (self.weights is None):
            raise ValueError(f"student is {self.student} and weights {self.weights}; an arm states one of them, because it has one student")
        trains = {"params": self.params, "updates": self.updates, "scores": self.scores != "teacher"}
        if self.student != "stage2" and (stated := [name for name, value in trains.items() if value]):
            raise ValueError(f"{stated[0]} is stated, but only student: stage2 is trained for this arm alone; take it out")
        return self


class Group(Section):
    """Cells that are run one after the other: each arm with each seed."""

    world: Name
    seeds: list[Positive]
    arms: list[Name]
    counted: bool = True  # False: measured on the validation clips, and never in a claim


class Metric(Section):
    """A number of a cell, by the names of the stage evaluate."""

    suite: Literal["prompts", "continuations", "recall"]
    name: str
    better: Literal["up", "down", ""]
    margin: PositiveFloat  # a smaller difference would not matter


class Gate(Section):
    """What must hold in a world before any of its claims can be informative; bounds are parts of the chance level."""

    arm: Name
    system: Name
    at_most: PositiveFloat | None = None
    at_least: PositiveFloat | None = None
    says: str


class Exclusion(Section):
    """A cell whose metric is below a bound counts in no contrast."""

    metric: Name
    below: float
    says: str


class Contrast(Section):
    """A claim: which arms, by which metric and which test."""

    name: Name
    family: Literal["primary", "secondary", "exploratory"]
    test: Literal["superior", "both", "trend", "interaction"]
    metric: Name
    beside: Name | None = None  # both: the metric on which the first arm may not be worse by its margin
    world: Name
    other_world: Name | None = None  # interaction
    arms: list[Name]
    says: str

    @model_validator(mode="after")
    def _check_test(self) -> Self:
        for name, test, value in (("beside", "both", self.beside), ("other_world", "interaction", self.other_world)):
            if (value is None) == (self.test == test):
                rule = "needs" if value is None else "has no use for"
                raise ValueError(f"{name} is {value}, but test {self.test} {rule} it; state {name} with test {test} alone")
        if len(self.arms) != 2 if self.test != "trend" else len(self.arms) < 3:
            rule = "at least 3 arms in their order" if self.test == "trend" else "2 arms, the one that should win first"
            raise ValueError(f"arms is {self.arms}, but test {self.test} compares {rule}")
        return self


class Curve(Section):
    """A curve of the page: the primary metric over what the arms of a line differ in."""

    title: str
    x: list[float]
    lines: dict[str, list[Name]]


class Cell(NamedTuple):
    """One training, measured: its name is also its file's."""

    world: str
    arm: str
    seed: int
    counted: bool

    @property
    def name(self) -> str:
        """The cell's name in study/dvc.yaml and in study/cells."""
        return f"{self.world}-{self.seed}-{self.arm}"


class Plan(Section):
    """All of study/plan.yaml."""

    profile: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    shared: dict[str, Changes]  # by profile: what every arm has
    worlds: dict[Name, WorldSet]
    reported: PositiveInt
    frames: PositiveInt
    teachers: dict[Name, Changes]
    inits: dict[Name, Changes]
    arms: dict[Name, Arm]
    groups: dict[Name, Group]
    metrics: dict[Name, Metric]
    gate: list[Gate]
    exclude: list[Exclusion]
    level: Annotated[float, Field(gt=0, lt=1)]
    resamples: PositiveInt
    contrasts: list[Contrast]
    curves: list[Curve]

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order in which they are run: group by group, seed by seed."""
        return [Cell(group.world, arm, seed, group.counted) for group in self.groups.values() for seed in group.seeds for arm in group.arms]

    def list_seeds(self, world: str, arm: str) -> list[int]:
        """List the training seeds that an arm's counted cells have in a world."""
        return sorted(cell.seed for cell in self.cells if cell.counted and (cell.world, cell.arm) == (world, arm))

    def trained_arm(self, name: str) -> Arm:
        """Return the arm whose training made an arm's weights: itself, or the one that `weights` names."""
        arm = self.arms[name]
        return self.arms[arm.weights] if arm.weights else arm

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        known: dict[str, Collection[str]] = {"world": self.worlds, "arm": self.arms, "metric": self.metrics}
        known |= {"teacher": self.teachers, "init": self.inits}
        for kind, where, name in self._list_references():
            if name not in known[kind]:
                raise ValueError(f"{where} names the {kind} {name}, which is not among {', '.join(known[kind])}")
        for name, arm in self.arms.items():
            if arm.weights and self.arms[arm.weights].student not in ("stage1", "stage2"):
                raise ValueError(f"arms.{name}.weights is {arm.weights}, which trains no student; name an arm with student: stage2")
        return self

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        found: dict[str, bool] = {}
        for cell in self.cells:
            if cell.name in found:
                raise ValueError(f"groups has the cell {cell.name} twice; a cell is run once, so take it out of one group")
            found[cell.name] = cell.counted
        for world in self.worlds:
            counted, other = ({c.seed for c in self.cells if c.world == world and c.counted == counts} for counts in (True, False))
            if both := counted & other:
                seed = min(both)
                raise ValueError(f"groups trains seed {seed} of {world} both counted and not; use seeds apart, or a claim is tested twice")
        return self

    @model_validator(mode="after")
    def _check_seeds_of_worlds(self) -> Self:
        seeds = [
            (f"worlds.{name}.{use}", getattr(w, use)) for name, w in self.worlds.items() for use in ("training", "validation", "reporting")
        ]
        for number, (name, seed) in enumerate(seeds):
            for other, same in seeds[:number]:
                if seed == same:
                    raise ValueError(f"{name} is {seed}, as {other} is; what is reported must be worlds that nothing was chosen on")
        return self

    @model_validator(mode="after")
    def _check_contrasts(self) -> Self:
        names = [contrast.name for contrast in self.contrasts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"contrasts has {twice[0]} twice; give each claim a name of its own")
        for contrast in self.contrasts:
            for world in filter(None, (contrast.world, contrast.other_world)):
                for arm in contrast.arms:
                    if not self.list_seeds(world, arm):
                        raise ValueError(
                            f"contrasts.{contrast.name} compares {arm} in {world}, but no counted group runs it there; add it to one"
                        )
            if not self.metrics[contrast.metric].better:
                raise ValueError(f"contrasts.{contrast.name} tests {contrast.metric}, which has no better side; use a metric that has")
        for curve in self.curves:
            for line, arms in curve.lines.items():
                if len(arms) != len(curve.x):
                    raise ValueError(f"curves: {line} has {len(arms)} arms, but x of {curve.title!r} {len(curve.x)} values; use as many")
        return self

    def _list_references(self) -> Iterator[tuple[str, str, str]]:
        """Yield the kind of thing, the place, and the name, of every name that must stand elsewhere in the plan."""
        for name, arm in self.arms.items():
            yield from (("teacher", f"arms.{name}", arm.teacher), ("init", f"arms.{name}", arm.init))
            if arm.weights:
                yield "arm", f"arms.{name}.weights", arm.weights
        for name, group in self.groups.items():
            yield "world", f"groups.{name}", group.world
            yield from (("arm", f"groups.{name}", arm) for arm in group.arms)
        for contrast in self.contrasts:
            yield from (("arm", f"contrasts.{contrast.name}", arm) for arm in contrast.arms)
            yield from (("metric", f"contrasts.{contrast.name}", one) for one in (contrast.metric, contrast.beside) if one)
            yield from (("world", f"contrasts.{contrast.name}", one) for one in (contrast.world, contrast.other_world) if one)
        yield from (("arm", "gate", gate.arm) for gate in self.gate)
        yield from (("metric", "exclude", rule.metric) for rule in self.exclude)
        yield from (("arm", "curves", arm) for curve in self.curves for arms in curve.lines.values() for arm in arms)


def read_plan(file: Path = FILE, *, profile: str | None = None) -> Plan:
    """Read and check the plan, for another profile if one is named; raise Refused with one sentence that begins with the file."""
    try:
        return Plan.model_validate(read_yaml(file) | ({"profile": profile} if profile else {}))
    except ValidationError as error:
        raise Refused(explain_first_error(error, Plan, file)) from None
