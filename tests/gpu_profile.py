"""Where the time of a step goes on a GPU: `tests/gpu_profile.py OUT.json [BATCHxTOKENS ...]`.

Llama-3-8B's geometry at random in 4 GB, LoRA of rank 8 on every projection of all layers. One
step of each case is profiled: when kernels ran and when weights were copied, in spans of
milliseconds from its start, and how much of the step each of both was busy.
`tests/gpu_profile.py --draw OUT.png RECORD.json ...` draws the records.
"""

import datetime
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import peft
import torch

import onn_core
from onn_core.record import describe_environment, write_json
from onn_core.weights.geometry import geometry
from onn_core.weights.random_model import write_random_model

CASES = ("1x512", "32x128", "32x512")
BUDGET = "4GB"
N_WARM = 4  # steps before the one that is profiled
JOINED_MS = 0.05  # a shorter gap is not drawn


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, in order."""
    union: list[list[float]] = []
    for start, stop in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], stop)
        else:
            union.append([start, stop])
    return [tuple(span) for span in union]


def length(spans: list[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in spans)


def both(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> float:
    """How long both unions are busy at once: |A| + |B| - |A or B|."""
    return length(first) + length(second) - length(merged([*first, *second]))


def spans_of(trace: Path) -> tuple[list, list, Counter]:
    """(start, stop) in ms of the compute's kernels and of the copies, and ms of each kernel."""
    events = json.loads(trace.read_text())["traceEvents"]
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = Counter(e["args"]["stream"] for e in on_device if e["cat"] == "kernel")
    compute = max(launched, key=launched.get)
    begin = min(e["ts"] for e in on_device)
    kernels, copies, names = [], [], Counter()
    for event in on_device:
        start = (event["ts"] - begin) / 1e3
        span = (start, start + event["dur"] / 1e3)
        if event["args"]["stream"] == compute:
            kernels.append(span)
            names[event["name"][:90]] += event["dur"] / 1e3
        elif event["cat"] == "gpu_memcpy":
            copies.append(span)
    return merged(kernels), merged(copies), names


def joined(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans, with short gaps between them filled."""
    padded = merged([(start, stop + JOINED_MS) for start, stop in spans])
    return [(round(start, 2), round(stop - JOINED_MS, 2)) for start, stop in padded]


def profile(folder: Path, batch_size: int, n_tokens: int) -> dict:
    torch.manual_seed(0)
    base = onn_core.from_pretrained(folder, memory_budget=BUDGET, device="cuda")
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(base.config.vocab_size, (batch_size, n_tokens), device="cuda")

    def step() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    plain_s = [step() for _ in range(N_WARM)][-1]
    activities = [torch.profiler.ProfilerActivity.CUDA]  # the CPU's would slow the step
    with torch.profiler.profile(activities=activities) as profiler:
        step_s = step()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        kernels, copies, names = spans_of(trace)
    plan = base.plan
    base.close()
    return {
        "batch_size": batch_size,
        "sequence": n_tokens,
        "memory_budget": BUDGET,
        "micro_batch_size": plan.micro_batch_size,
        "captured": plan.captured,
        "boundaries": plan.boundaries,
        "step_s_unprofiled": plain_s,
        "step_s": step_s,
        "kernels_s": length(kernels) / 1e3,
        "copies_s": length(copies) / 1e3,
        "both_s": both(kernels, copies) / 1e3,
        "kernels_ms": joined(kernels),
        "copies_ms": joined(copies),
        "longest_kernels_ms": dict(names.most_common(14)),
    }


def draw(out: str, paths: list[str]) -> None:
    """A panel a step: the share of each hundredth of it in which kernels ran and weights came."""
    import matplotlib.pyplot as plt

    steps = []
    for record in (json.loads(Path(path).read_text()) for path in paths):
        device = record["environment"]["device"]
        steps += [(device, step) for step in record["steps"]]
    figure, panels = plt.subplots(len(steps), figsize=(9, 2.1 * len(steps)), squeeze=False)
    for panel, (device, step) in zip(panels[:, 0], steps, strict=True):
        total_ms = 1e3 * step["step_s"]
        edges = [total_ms * n / 100 for n in range(101)]
        lanes = (("kernels", "kernels_ms", "kernels_s"), ("copies", "copies_ms", "copies_s"))
        for name, spans, busy in lanes:
            shares = [
                100 * both([tuple(span) for span in step[spans]], [(begin, end)]) / (end - begin)
                for begin, end in itertools.pairwise(edges)
            ]
            label = f"{name}, {100 * step[busy] / step['step_s']:.0f} % of the step"
            panel.stairs(shares, edges, label=label, linewidth=1.4)
        panel.set_title(
            f"{step['batch_size']} x {step['sequence']} tokens, {device}", fontsize=9, loc="left"
        )
        panel.set(ylim=(0, 108), xlim=(0, total_ms), ylabel="busy (%)")
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    panels[-1, 0].set_xlabel("time in the step (ms)")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    if sys.argv[1] == "--draw":
        draw(sys.argv[2], sys.argv[3:])
        return
    record = {"date": datetime.date.today().isoformat(), "steps": []}
    record["environment"] = describe_environment(torch.device("cuda"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_model(Path(scratch) / "model", geometry("llama-3-8b"))
        for case in sys.argv[2:] or CASES:
            record["steps"].append(profile(folder, *map(int, case.split("x"))))
            shown = {k: v for k, v in record["steps"][-1].items() if not k.endswith("s_ms")}
            print(json.dumps(shown), flush=True)
            write_json(Path(sys.argv[1]), record)


if __name__ == "__main__":
    main()
