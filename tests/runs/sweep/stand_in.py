"""A launcher that trains nothing: it writes the records that a run would, fails or waits on demand, and keeps count."""

from __future__ import annotations

from pathlib import Path

from mmtrain.runs.sweep.run_sweep import SweepOptions, run_sweep

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"

SCRIPT = r"""
import json, pathlib, re, signal, sys, time

given = dict(text.partition("=")[::2] for text in sys.argv[1:])
folder = pathlib.Path(given["run.dir"].strip("'")) / given["run.name"].strip("'")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
orders = pathlib.Path(__file__).parent
with (orders / "started").open("a") as file:
    file.write(folder.name + "\n")
(orders / f"environment-{folder.name}").write_text(json.dumps({**given, **dict(__import__("os").environ)}))
if (orders / f"fail-{folder.name}").exists():
    print("step 1/2")
    print("error: model.x=1: planned", file=sys.stderr)
    print("trailing line", file=sys.stderr)
    sys.exit(2)
tokens = int(re.search(r"tokens: (\d+), batch", given["stage.phases"])[1])
batch = int(re.search(r"at: 0, tokens: (\d+)", given["stage.phases"])[1])
layers, every = int(given["model.num_layers"]), int(given["log.valid_interval"])
steps = tokens // batch
folder.mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(1, steps + 1):
        record = {"step": step, "tokens": step * batch, "loss": 3.0, "tokens_per_s": 1000.0}
        file.write(json.dumps(record) + "\n")
        if step == steps or (every and step % every == 0):
            loss = None if (orders / f"diverge-{folder.name}").exists() else 2 + 1 / layers + 10 / step
            file.write(json.dumps({"step": step, "tokens": step * batch, "val_loss": loss}) + "\n")
        file.flush()
        if step == 1 and (orders / f"wait-{folder.name}").exists():
            left = time.monotonic() + 300  # whatever becomes of the test, it does not stay for ever
            while not stop and not (orders / f"end-{folder.name}").exists() and time.monotonic() < left:
                time.sleep(0.02)
            sys.exit(143 if stop else 1)
"""


class StandIn:
    """A sweep of three small sizes in a folder of its own, started through the stand-in.

    Attributes:
        place: of the launcher, its orders and the sweep.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.launcher = place, place / "launcher.py"
        self.launcher.write_text(SCRIPT)
        self.folder = place / "sweeps" / "tiny"

    def arguments(self, *more: str) -> list[str]:
        """Overrides of the sweep: three sizes of one architecture, one run each of eight steps."""
        return [
            "sweep=tiny_cpu", "sweep.name=tiny", f"sweep.dir='{self.place / 'sweeps'}'", "sweep.architectures=[hybrid]",
            "sweep.compute=[]", "sweep.tokens=[8Ki]", "sweep.validations=4", "sweep.warmup=2", "sweep.seq_len=256",
            "sweep.batch_tokens=[1Ki]", "parallel.micro_batch_rows=1", "cluster.device=cpu", "sweep.fit=false",
            "sweep.sizes=[{name: a, layers: 8, hidden: 16, ffn: 16}, {name: b, layers: 16, hidden: 16, ffn: 16}, "
            "{name: c, layers: 24, hidden: 16, ffn: 16}]", *more,
        ]  # fmt: skip

    def run(self, *more: str, **flags: bool) -> int:
        """Run the sweep; returns its exit code."""
        return run_sweep(self.launcher, CONFIGS, self.arguments(*more), SweepOptions(**flags))

    def order(self, what: str, run: str) -> Path:
        """Tell the launcher to `fail`, `wait` (`end` ends that) or `diverge` for a run."""
        path = self.place / f"{what}-{run}"
        path.touch()
        return path

    @property
    def started(self) -> list[str]:
        """Names of the runs that were started, as often as they were."""
        path = self.place / "started"
        return sorted(path.read_text().split()) if path.exists() else []
