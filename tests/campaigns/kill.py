"""Kills processes at random moments; the next start must go on, and end as if nothing had been.

    python -m tests.campaigns.kill [--kills 20] [--seed 0] [--out tests/campaigns/results/kill.json]

Kills by the clock (SIGKILL from outside, at a random moment of the training) and by tripwire (at
a random one of all writes, renames, removals and syncs on the files of a part: checkpoints, the
cache, the saved adapter, the converted model, trials of a sweep). After every kill: each checkpoint
that counts as whole is so, and once there was one there always is one. In the end the adapter's
bytes and every logged figure are those of a run that nobody killed.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).resolve().parent / "results" / "kill.json"
NEEDLES = {
    "saving": "/run/checkpoint-",
    "cache": "/run/teacher_cache",
    "adapter": "/saved/",
    "conversion": "/cache/",
    "sweep": "/sweep/",
}
"""Kind of a kill by tripwire -> what the paths of its operations hold."""
OF = {"sweep": "sweep", "conversion": "convert"}
"""Kind of a kill -> what is run; else the training."""
SHARES = ("time", "saving", "saving", "cache", "time", "adapter", "sweep", "conversion")
LONGEST = 600


def start(kind, folder, **environment):
    """A worker's process."""
    command = [sys.executable, "-m", "tests.campaigns.work", kind, str(folder)]
    quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **environment}
    log = (folder / "output.txt").open("ab")
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **quiet}, stdout=log, stderr=subprocess.STDOUT
    )


def killed(kind, folder, moment, rng, counts):
    """Starts a worker and kills it; whether it died of it (else it had ended before)."""
    (folder / "begun").unlink(missing_ok=True)
    if moment == "time":
        process = start(kind, folder)
        while not (folder / "begun").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, counts["seconds"]))
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    at = rng.randint(1, counts[moment])
    process = start(kind, folder, LWF_KILL_AT=f"{at} {NEEDLES[moment]}")
    return process.wait(LONGEST) == -signal.SIGKILL


def ended(kind, folder):
    """Lets a worker go on to its end.

    Raises:
        RuntimeError: It could not.
    """
    if start(kind, folder).wait(LONGEST):
        raise RuntimeError((folder / "output.txt").read_text()[-3000:])


def whole_checkpoints(folder):
    """Names of the checkpoints that count as whole, each of them read to the end."""
    sys.path.insert(0, str(ROOT))
    from lwf_unsloth.checkpoints import is_complete

    found = []
    for path in sorted((folder / "run").glob("checkpoint-*")):
        if is_complete(path):
            import torch
            from safetensors.torch import load_file

            load_file(path / "adapter_model.safetensors")
            torch.load(path / "optimizer.pt", weights_only=True)
            json.loads((path / "trainer_state.json").read_text())
            found.append(path.name)
    return found


def outcome(kind, folder):
    """What must be the same in the end, as hashes and values."""
    if kind == "train":
        weights = (folder / "saved" / "adapter" / "adapter_model.safetensors").read_bytes()
        log = (folder / "log.json").read_text()
        return {"adapter": hashlib.sha256(weights).hexdigest(), "log": log}
    if kind == "sweep":
        return {"points": (folder / "points.json").read_text()}
    place = Path((folder / "place").read_text())
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(place.iterdir())}
    left = [p.name for p in place.parent.iterdir() if p.is_dir() and p.name != place.name]
    return {"files": files, "left": [name for name in left if not name.startswith("fetch-")]}


def references(root, kinds):
    """Runs that nobody kills, and how many operations and seconds they take."""
    found, counts = {}, {}
    for kind in kinds:
        folder = root / f"whole-{kind}"
        folder.mkdir(parents=True)
        needles = {name: text for name, text in NEEDLES.items() if OF.get(name, "train") == kind}
        process = start(kind, folder, LWF_COUNT="|".join(needles.values()))
        while not (folder / "begun").exists() and process.poll() is None:
            time.sleep(0.02)
        begun = time.monotonic()
        if process.wait(LONGEST):
            raise RuntimeError((folder / "output.txt").read_text()[-3000:])
        if kind == "train":
            counts["seconds"] = time.monotonic() - begun
        operations = json.loads((folder / "count").read_text())
        counts.update({name: max(1, operations[text]) for name, text in needles.items()})
        found[kind] = outcome(kind, folder)
    return found, counts


def campaign(root, kills, seed, shares=SHARES):
    """Kills, restarts, compares; the figures."""
    rng = random.Random(seed)
    plan = [shares[n % len(shares)] for n in range(kills)]
    kinds = sorted({OF.get(moment, "train") for moment in plan})
    wanted, counts = references(root, kinds)
    counted = dict(counts)
    if "saving" in counts:  # several kills of one run: each falls into its next saves
        counts["saving"] = max(1, counts["saving"] // 5)
        counts["seconds"] = max(0.5, counts["seconds"] / 2)
    done, losses, unequal, tries = Counter(), [], [], 0
    for kind in kinds:
        waiting = [moment for moment in plan if OF.get(moment, "train") == kind]
        while waiting and tries < 4 * kills:
            folder = root / f"killed-{kind}-{tries}"
            folder.mkdir()
            had = False
            for _ in range(min(4, len(waiting))):  # kills of the same run
                tries += 1
                if not killed(kind, folder, waiting[0], rng, counts):
                    break
                done[waiting.pop(0)] += 1
                now = bool(whole_checkpoints(folder)) if kind == "train" else False
                if had and not now:
                    losses.append(f"{folder.name}: no whole checkpoint is left")
                had = had or now
            ended(kind, folder)
            now = outcome(kind, folder)
            unequal += [f"{folder.name}: {n}" for n in now if now[n] != wanted[kind][n]]
    return {
        "kills": sum(done.values()),
        "by_kind": dict(done),
        "survived": sum(done.values()) - len(losses),
        "runs": tries,
        "equal_bit_for_bit": not unequal,
        "unequal": unequal,
        "lost": losses,
        "operations": counted,
    }


def about(seed, command):
    """Date, commit and versions of a result."""
    from importlib.metadata import version

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "lwf_unsloth")),
        "command": command,
        "seed": seed,
        "device": "CPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "unsloth")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    meta = about(asked.seed, f"python -m tests.campaigns.kill --kills {asked.kills}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lwf-kill-") as root:
        found = campaign(Path(root), asked.kills, asked.seed)
    found["seconds"] = round(time.monotonic() - begun)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"meta": meta, "rows": [found]}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if found["equal_bit_for_bit"] and found["survived"] == found["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
