"""`make toy` and `make test` on machines of every kind: which packages, which sampler, what is said where
something is missing. The interpreter, pip and the machine are small scripts; make is the real one.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

PYTHON = f"""#!/bin/sh
[ "$1" != -m ] && exec {sys.executable} "$@"
mkdir -p $3/bin  # python -m venv DIRECTORY
for name in pip torchrun python; do cp {{tmp}}/program $3/bin/$name; done
"""
PROGRAM = """#!/bin/sh
echo "$(basename $0) $@" >>{tmp}/log
case "$(basename $0) $@" in *{fails}) echo "it fails" >&2; exit 1; esac
"""


@pytest.fixture
def make(tmp_path):
    def script(name, text):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(goal, machine="Linux x86_64", gpu=False, fails="nothing", python=PYTHON):
        """The finished make, and the lines that pip, torchrun and python were called with."""
        kernel, processor = machine.split()
        script("uname", f'#!/bin/sh\n[ "$1" = -s ] && echo {kernel} || echo {processor}\n')
        script("nvidia-smi", f"#!/bin/sh\n{'echo GPU 0: one' if gpu else 'exit 9'}\n")
        script("python3", python.replace("{tmp}", str(tmp_path)))
        script("program", PROGRAM.format(tmp=tmp_path, fails=fails))
        (tmp_path / "log").write_text("")
        command = ["make", "-C", ROOT, goal, f"VENV={tmp_path}/venv", f"PYTHON={tmp_path}/python3"]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return done, (tmp_path / "log").read_text().splitlines()

    return run


LOCK = "pip install --no-deps -r requirements-cpu.txt"
TOY = "torchrun train_dpo.py --sync-steps 10"


def test_once_installed_it_stays(make):
    assert make("toy")[1] == [LOCK, TOY]
    assert make("toy")[1] == [TOY]
    assert make("test")[1] == ["python -m pytest -n 2 --dist loadfile"]


def test_a_gpu_takes_the_ordinary_builds(make):
    assert make("toy", gpu=True)[1] == ["pip install -r requirements.txt", TOY]


@pytest.mark.parametrize("machine", ["Darwin arm64", "Linux aarch64"])
def test_without_a_vllm_transformers_samples(make, machine):
    install, run = make("toy", machine)[1]
    assert run == f"{TOY} --sampler hf"
    packages = {package.split("==")[0] for package in install.removeprefix("pip install ").split()}
    assert packages == {
        "torch",
        "transformers",
        "datasets",
        "xxhash",
        "tqdm",
        "math-verify",
        "pytest",
        "pytest-xdist",
        "ruff",
    }


def test_torchs_own_index_is_the_second_try(make):
    done, called = make("toy", fails="requirements-cpu.txt")
    assert called == [LOCK, f"{LOCK} --extra-index-url https://download.pytorch.org/whl/cpu", TOY]
    assert done.returncode == 0


def test_a_failed_install_is_done_again(make):
    done, called = make("toy", fails="*")
    assert done.returncode == 2 and len(called) == 2 and "pip" in called[1]
    assert make("toy")[1] == [LOCK, TOY]


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (
            "#!/bin/sh\n[ $1 = -V ] && echo Python 3.10.12\nexit 1\n",
            "Python 3.11 to 3.14 is needed, not Python 3.10.12: make toy PYTHON=python3.12",
        ),
        (
            f"#!/bin/sh\nexport PYTHONPATH={{tmp}}/broken; exec {sys.executable} \"$@\"\n",
            "has no venv module: on Debian or Ubuntu, apt install python3-venv",
        ),
        ("#!/no/such/file\n", "Python 3.11 to 3.14 is needed, not "),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line(make, tmp_path, python, said):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ensurepip.py").write_text("raise ImportError")
    done, called = make("toy", python=python)
    assert done.returncode == 2 and called == [] and not (tmp_path / "venv").exists()
    assert said in done.stdout and done.stdout.count("\n") <= 3  # make names the folder it enters and leaves
