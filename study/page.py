"""docs/evidence.md, from the committed cells alone: the claims' table first, then what stands behind it, and pictures in docs/evidence."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cf_model.evaluate.report import format_number
from study import figures
from study.cells import CELLS, read_cells
from study.inference import Evidence, Finding, check_gates, gather_evidence, judge_contrasts
from study.nodes import ROOT
from study.plan import Plan

SCALE = "on a synthetic world at small scale"  # in every headline, because each number is of that and of nothing else
PAGE, PICTURES = ROOT / "docs/evidence.md", ROOT / "docs/evidence"
TABLE_3 = ("stage1", "cdmd", "cdmd_absolute", "uniform_1", "uniform_2", "no_erft", "no_clean_context")
TABLE_3_NAMES = {"stage1": "without stage 2", "cdmd": "Context Forcing", "cdmd_absolute": "without bounded positions",
                 "uniform_1": "uniform, every chunk", "uniform_2": "uniform, every second chunk", "no_erft": "without ERFT",
                 "no_clean_context": "without clean context"}  # fmt: skip
PLANE = ("stage1", "stage1_longer", "cdmd", "memoryless", "memoryless_base", "memoryless_short", "memoryless_wide")
TESTS = {"superior": "first better", "both": "first better, and no worse beside", "trend": "Page's trend", "interaction": "interaction"}


def write_page(plan: Plan, page: Path = PAGE, pictures: Path = PICTURES, cells: Path = CELLS) -> Path:
    """Write the page and its pictures, from the cells of every profile; pictures of a page before are removed. Returns the page's path."""
    evidence = gather_evidence(plan, read_cells(cells / plan.profile))
    folders = sorted(folder for folder in cells.glob("*/") if folder.name != plan.profile)
    others = [gather_evidence(plan.model_copy(update={"profile": one.name}), read_cells(one)) for one in folders]
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    page.write_text(render_page(evidence, draw_pictures(evidence, pictures, page.parent), others))
    if not any(pictures.iterdir()):
        pictures.rmdir()
    return page


def render_page(evidence: Evidence, pictures: Mapping[str, str], others: Sequence[Evidence] = ()) -> str:
    """Render the page's text; `pictures` are links by their names, `others` the same plan at other profiles."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["number"] = format_number
    template = environment.from_string((Path(__file__).parent / "page.md.j2").read_text())
    plan = evidence.plan
    findings = judge_contrasts(evidence)
    return template.render(
        scale=SCALE,
        plan=plan,
        claims=[describe_finding(plan, found) for found in findings],
        verdicts={
            verdict: sum(found.verdict == verdict for found in findings) for verdict in ("holds", "does not hold", "not informative")
        },
        cells=len(evidence.cells),
        counted=sum(cell.counted for cell in plan.cells),
        foreign=evidence.foreign,
        excluded={"-".join(map(str, key)): rule for key, rule in evidence.excluded.items()},
        codes=len({str(cell.about["code"]) for cell in evidence.cells.values()}),
        machines=list_machines(evidence),
        gates=[state for world in plan.worlds for state in check_gates(evidence, world)],
        beside=list(list_arms(evidence)),
        table_3=[(TABLE_3_NAMES[arm], row) for arm in TABLE_3 if (row := summarise_arm(evidence, "orbit", arm))],
        costs=list(list_costs(evidence)),
        pictures=pictures,
        others=[(one.plan.profile, list_machines(one), list_claims(one)) for one in others],
    )


def list_claims(evidence: Evidence) -> list[dict[str, Any]]:
    """List the rows of the claims for which there are cells."""
    return [describe_finding(evidence.plan, found) for found in judge_contrasts(evidence) if found.seeds]


def describe_finding(plan: Plan, found: Finding) -> dict[str, Any]:
    """Return a row of the claims' table."""
    contrast = found.contrast
    unit = contrast.metric.replace("_", " ") + (f" and {contrast.beside}" if contrast.beside else "")
    arms = (" → " if contrast.test == "trend" else " − ").join(contrast.arms)
    where = contrast.world + (f" against {contrast.other_world}" if contrast.other_world else "")
    effect = "–"
    if found.effect is not None:
        effect = f"{format_number(found.effect)} [{format_number(found.low)}, {format_number(found.high)}]"
    verdict = found.verdict if found.verdict != "not informative" else f"not informative ({found.why})"
    p = "–" if found.p_family is None else format_number(found.p_family) + (" (uncorrected)" if contrast.family == "exploratory" else "")
    row = {"says": contrast.says, "family": contrast.family, "test": f"{TESTS[contrast.test]}: {arms}, {unit}, {where}", "effect": effect}
    return row | {"n": len(found.seeds), "p": p, "verdict": verdict, "excluded": found.excluded}


def summarise_arm(evidence: Evidence, world: str, arm: str) -> dict[str, float | int | None] | None:
    """Return an arm's mean of every metric over its seeds, and their number; None without a cell."""
    seeds = sorted(seed for w, a, seed in evidence.cells if (w, a) == (world, arm))
    if not seeds:
        return None
    out: dict[str, float | int | None] = {"n": len(seeds)}
    for name, metric in evidence.plan.metrics.items():
        values = [value for seed in seeds if (value := evidence.mean(world, arm, seed, metric)) is not None]
        out[name] = sum(values) / len(values) if values else None
    return out


def list_arms(evidence: Evidence) -> Iterator[tuple[str, str, dict[str, float | int | None]]]:
    """Yield world, arm and means of every arm that has cells, in the order of the plan."""
    for world, arm in dict.fromkeys((cell.world, cell.arm) for cell in evidence.plan.cells if cell.counted):
        if evidence.plan.trained_arm(arm).student != "teacher" and (row := summarise_arm(evidence, world, arm)):
            yield world, arm, row


def list_costs(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Yield what the training of each arm took: steps, updates, operations, and seconds of one cell after the other."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for (world, arm, _), cell in evidence.cells.items():
        if "steps" in cell.about and evidence.plan.arms[arm].student:
            groups.setdefault((world, arm), []).append(cell.about)
    for (world, arm), rows in groups.items():
        seconds = [row["seconds"]["stage2"] for row in rows if "stage2" in row["seconds"]]
        first = {name: rows[0][name] for name in ("steps", "updates", "batch", "tflop")}
        yield {"world": world, "arm": arm, **first, "seconds": sum(seconds) / len(seconds) if seconds else None}


def list_machines(evidence: Evidence) -> list[str]:
    """List the machines that made the cells."""
    found = {
        (m.get("cpu"), m.get("cores"), m.get("memory_gib"), m.get("gpu"))
        for m in (cell.about["machine"] for cell in evidence.cells.values())
    }
    return sorted(f"{cpu}, {cores} cores, {memory} GiB" + (f", {gpu}" if gpu else "") for cpu, cores, memory, gpu in found)


def draw_pictures(evidence: Evidence, folder: Path, beside: Path) -> dict[str, str]:
    """Draw every picture for which there are cells, and return their links, relative to the page's folder."""
    links: dict[str, str] = {}

    def save(name: str, content: bytes | None) -> None:
        if content:
            (folder / f"{name}.png").write_bytes(content)
            links[name] = (folder / f"{name}.png").relative_to(beside).as_posix()

    save("plane", figures.draw_plane(evidence, "orbit", PLANE))
    for number, curve in enumerate(evidence.plan.curves):
        save(f"curve-{number}", figures.draw_curve(evidence, "orbit", curve))
    save("drift", figures.draw_over_time(evidence, "orbit", ("stage1", "cdmd", "memoryless", "memoryless_base"), "sky_error"))
    save("sharpness", figures.draw_over_time(evidence, "orbit", ("stage1", "cdmd", "memoryless", "memoryless_base"), "sharpness"))
    save("erft", figures.draw_over_time(evidence, "orbit", ("cdmd", "no_erft"), "sky_error"))
    for name, png in list_strips(evidence):
        save(f"strip-{name}", png)
    return links


def list_strips(
    evidence: Evidence, arms: Sequence[str] = ("teacher", "stage1", "cdmd", "memoryless", "memoryless_base")
) -> Iterator[tuple[str, bytes]]:
    """Yield the strips of the first clip, of the first seed that has any: truth, teacher and the students."""
    for arm in arms:
        own = sorted(seed for world, a, seed in evidence.cells if (world, a) == ("orbit", arm))
        rows = [row for seed in own[:1] for row in evidence.cells["orbit", arm, seed].rows if row["kind"] == "strip"]
        for row in rows:
            if row["system"] == "student" or arm == "teacher":
                yield (arm if row["system"] == "student" else row["system"]), base64.b64decode(row["png"])
