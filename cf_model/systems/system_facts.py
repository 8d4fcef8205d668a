"""Systems that the papers compare, and what is known of each: how its videos come here, its weights, settings and licence.

docs/systems.md is this table for people. Settings are those that each system's own repository or diffusers' pipeline states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Adapter = Literal["native", "diffusers", "folder", "published"]
ADAPTERS: Mapping[Adapter, str] = {
    "native": "a folder that `cf export --to diffusers` wrote, of our own or of imported weights",
    "diffusers": "the pipeline of diffusers, from a folder of its weights",
    "folder": "videos made elsewhere, with a manifest, scored by `cf score`",
    "published": "printed numbers only",
}
APACHE = "Apache-2.0"


@dataclass(frozen=True)
class SystemFacts:
    """What is known of a system."""

    adapter: Adapter
    weights: str  # name on the Hugging Face Hub, or where they are
    settings: str  # for people
    licence: str
    printed: str | None = None  # its name in cf_model/evaluate/published.json
    pipeline: str | None = None  # class of diffusers
    size: tuple[int, int] = (480, 832)  # height and width
    fps: int = 16
    longest: float | None = None  # seconds that it is made for; None: any
    call: Mapping[str, Any] = field(default_factory=dict)  # keywords of the pipeline's call
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # settings of its scheduler that differ from its folder's
    remarks: str = ""


SYSTEMS: Mapping[str, SystemFacts] = {
    "ltx-video": SystemFacts(
        "diffusers", "Lightricks/LTX-Video", "512x704, 161 frames, 25 fps, 50 steps, guidance 3", "not checked", "LTX-Video",
        "LTXPipeline", (512, 704), 25, 6.5, {"num_inference_steps": 50, "guidance_scale": 3.0, "frame_rate": 25},
        remarks="short videos only",
    ),
    "wan2.1": SystemFacts(
        "diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "480x832, 81 frames, 16 fps, 50 steps, guidance 5", APACHE, "Wan2.1",
        "WanPipeline", longest=5.1, call={"num_inference_steps": 50, "guidance_scale": 5.0}, remarks="short videos only",
    ),
    "skyreels-v2": SystemFacts(
        "diffusers", "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        "544x960, 24 fps, 97 frames at once, 17 overlap, noise 20 on the condition, shift 8, 50 steps, guidance 6", "other (its own)",
        "SkyReels-V2", "SkyReelsV2DiffusionForcingPipeline", (544, 960), 24,
        call={"num_inference_steps": 50, "guidance_scale": 6.0, "base_num_frames": 97, "overlap_history": 17, "addnoise_condition": 20,
              "ar_step": 0, "fps": 24},
        scheduler={"flow_shift": 8.0}, remarks="about 50 minutes for 60 s",
    ),
    "framepack-f1": SystemFacts(
        "diffusers", "lllyasviel/FramePack_F1_I2V_HY_20250503 with hunyuanvideo-community/HunyuanVideo and lllyasviel/flux_redux_bfl",
        "480x832, 30 fps, windows of 9 latents, 25 steps, distilled guidance 10, sampling vanilla", "not checked",
        "FramePack-F1", "HunyuanVideoFramepackPipeline", fps=30,
        call={"num_inference_steps": 25, "guidance_scale": 10.0, "latent_window_size": 9, "sampling_type": "vanilla"},
        remarks="begins from a picture (`--first-frames`), which Context Forcing does not name; that F1 is diffusers' vanilla is a guess",
    ),
    "anyflow-far": SystemFacts(
        "diffusers", "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", "480x832, 81 frames, 16 fps, 4 steps", "not checked", None,
        "AnyFlowFARPipeline", call={"num_inference_steps": 4, "guidance_scale": 1.0}, remarks="not in the papers; causal, from Wan 1.3B",
    ),
    "context-forcing": SystemFacts(
        "native", "this project's own, trained by `cf repro`", "as trained: `cf preset use cf_default`", APACHE, "Context Forcing, student",
        remarks="the authors' weights (TIGER-AI-Lab/Context-Forcing) are non-commercial, so they are not read here",
    ),
    "self-forcing": SystemFacts(
        "native", "gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt", "`cf preset use self_forcing`", APACHE, "Self Forcing",
    ),
    "longlive": SystemFacts(
        "native", "Efficient-Large-Model/LongLive-1.3B longlive_base.pt and lora.pt", "`cf preset use longlive`", APACHE, "LongLive",
    ),
    "infinity-rope": SystemFacts(
        "native", "Self Forcing's weights", "`cf preset use infinity_rope`: window 6, sink 1", APACHE, "Infinity-RoPE",
    ),
    "rolling-forcing": SystemFacts(
        "folder", "TencentARC/RollingForcing checkpoints/rolling_forcing_dmd.pt", "5 steps, shift 5, 126 latents", "none stated",
        "Rolling Forcing", remarks="its rolling window denoises several chunks at once, which the rollout here does not",
    ),
    "magi-1": SystemFacts(
        "folder", "sand-ai/MAGI-1 ckpt/magi/4.5B_distill", "720x720, 24 fps, chunks of 6 latents, 64 steps", APACHE, "MAGI-1", fps=24,
    ),
    "nova": SystemFacts(
        "folder", "BAAI/nova-d48w1024-osp480", "480x768, 33 frames, 12 fps, guidance 7, flow 5", APACHE, "NOVA", fps=12,
    ),
    "pyramid-flow": SystemFacts(
        "folder", "rain1011/pyramid-flow-sd3", "768p, 24 fps, 121 frames, guidance 7", "MIT", "Pyramid Flow", fps=24, longest=10.0,
    ),
    "causvid": SystemFacts(
        "published", "tianweiy/CausVid", "–", "CC BY-NC-SA 4.0", "CausVid",
        remarks="non-commercial: named only, neither code nor weights of it are read here",
    ),
    "self-forcing++": SystemFacts(
        "published", "none released", "–", "–", "Self Forcing++", remarks="the preset self_forcing_pp trains after its paper",
    ),
}  # fmt: skip


def write_table() -> str:
    """Return the systems as a table in Markdown."""
    rows = ["| system | adapter | weights | settings | licence of the weights | remarks |", "|---|---|---|---|---|---|"]
    for name, one in SYSTEMS.items():
        adapter = f"{one.adapter}, {one.pipeline}" if one.pipeline else one.adapter
        rows.append(f"| `{name}` | {adapter} | {one.weights} | {one.settings} | {one.licence} | {one.remarks or '–'} |")
    return "\n".join(rows) + "\n"
