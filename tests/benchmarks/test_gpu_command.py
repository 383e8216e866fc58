"""`make gpu` with no GPU: its dry run on a bare installation, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import gpu
import gpu_races
import gpu_report
import pytest
import sparq_kernels
import torch
from gpu_cases import TINY
from gpu_report import FAILED, MISSING, OK, OUT_OF_TIME, Outcome
from stage import Stage

ROOT = Path(__file__).parents[2]
# What the image lacks that has a GPU, or need not have: none of it may be needed.
ABSENT = (
    *("lm_eval", "bitsandbytes", "matplotlib", "datasets", "peft", "sklearn", "scipy", "pandas", "gguf", "llama_cpp"),
    *("flash_attn", "flash_attn_interface", "flashinfer", "rouge_score", "wonderwords", "build", "mypy"),
)
SITE = f"""
import importlib.machinery, importlib.metadata, sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
find = importlib.machinery.PathFinder.find_spec

class Hiding:
    def __call__(self, name, *rest):
        return None if name.partition(".")[0] in {ABSENT!r} else find(name, *rest)

importlib.machinery.PathFinder.find_spec = Hiding()  # pytest and dill call it by this name
sys.path.append('ELSEWHERE')
found = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name == "sparq-attention":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)

importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of an installation without SparQ, and with somebody else's `tests` and `stage` at the end of its
    path."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    for folder in (site, elsewhere / "tests", elsewhere / "stage"):
        folder.mkdir(parents=True)
    for name in ("tests", "stage"):
        (elsewhere / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    (site / "sitecustomize.py").write_text(SITE.replace("ELSEWHERE", str(elsewhere)))
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    return {**environment, "PYTHONPATH": str(site)}


def test_the_command_runs_on_a_bare_installation(tmp_path: Path, bare: dict[str, str]) -> None:
    pytest.importorskip("triton")
    out, program = tmp_path / "out", str(ROOT / "benchmarks" / "gpu.py")
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = subprocess.run(
        [sys.executable, program, "--device", "cpu"],
        env={**bare, "OUT": str(out)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = (out / "log.txt").read_text()
    found = json.loads((out / "gpu.json").read_text())
    assert done.returncode == 0 and found["wrong"] == [], done.stdout + done.stderr + log
    assert {name: stage["status"] for name, stage in found["stages"].items()} == {one.name: OK for one in gpu.STAGES}
    assert found["tests"]["passed"] > 0 and found["generation"]["rows"] and found["attention"]["profile"]
    assert all(row["registers"] for row in found["kernels"]["rows"])
    assert {row["replays"] for row in found["races"]["rows"]} == {20}
    assert {row["wrong"] for row in found["attention"]["rows"]} == {None}
    assert found["attention"]["operator"] == "reference", "no time of a dry run looks like a speed-up"
    assert found["machine"]["torch"] == torch.__version__ and str(ROOT) not in (out / "gpu.json").read_text()

    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "log.txt"} | {"tests.log"}
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before, "nothing was measured"
    lines = done.stdout.splitlines()
    assert len(lines) <= gpu_report.LINES and max(map(len, lines)) <= gpu_report.LENGTH
    assert "nothing wrong" in lines and "A dry run on a CPU: no time below is a measurement." in lines
    assert any(line.startswith("Attention of one new token") for line in lines)


def test_the_limits_are_less_than_eight_minutes() -> None:
    assert sum(stage.seconds for stage in gpu.STAGES) == 470
    assert all(stage.seconds > stage.margin + 10 for stage in gpu.STAGES)


PROGRAMS = {
    # Its children would write for ever.
    "late.py": """
        child = "import time, sys; [(open(sys.argv[1], 'w').write(str(n)), time.sleep(0.01)) for n in range(9999)]"
        for group, name in ((False, "child"), (True, "other")):
            subprocess.Popen([sys.executable, "-c", child, f"{path}.{name}"], start_new_session=group)
        write({"said": "one row", "rows": [1]})
        open(path + ".part", "w").write("half")
        time.sleep(60)
    """,
    "crash.py": 'write({"rows": []}); print("much"); raise RuntimeError("fell over")',
    "junk.py": 'open(path, "w").write("[1, 2"); print("not JSON")',
    "stopped.py": 'write({"passed": 3, "failed": [], "skipped": ["a", "b"], "timed_out": True}); sys.exit(1)',
    "wrong.py": """
        write({"passed": 3, "failed": [{"name": "test_a", "message": "off by one"}], "skipped": 1})
        sys.exit(1)
    """,
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    head = (
        "import json, subprocess, sys, time\n"
        "path = sys.argv[sys.argv.index('--json') + 1]\n"
        "write = lambda content: open(path, 'w').write(json.dumps(content))\n"
    )
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(head + textwrap.dedent(body) + "\n")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def outcome_of(program: str, out: Path, seconds: int = 30) -> Outcome:
    stage = gpu.Stage(program.partition(".")[0], "about", seconds, program)
    return gpu.run(stage, "cpu", out, dict(os.environ))


def test_a_late_stage_is_stopped_with_its_children_and_keeps_its_rows(programs: Path) -> None:
    children = [programs / f"late.json.{name}" for name in ("child", "other")]
    outcome = outcome_of("late.py", programs, seconds=5)
    log = (programs / "log.txt").read_text()
    assert outcome.status == OUT_OF_TIME and outcome.content.get("rows") == [1], (outcome, log)
    assert 5 <= outcome.seconds < 20, outcome
    assert outcome.wrong() == [], "it is told, and is not wrong"
    written = [child.read_text() for child in children]
    time.sleep(0.2)
    assert [child.read_text() for child in children] == written, "they are dead"
    assert sorted(path.name for path in programs.iterdir()) == ["late.json.child", "late.json.other", "log.txt"]


def test_a_stage_that_breaks_down_is_wrong(programs: Path) -> None:
    crash, missing = outcome_of("crash.py", programs), outcome_of("nowhere.py", programs)
    assert crash.status == FAILED and crash.wrong() == ["crash: exit status 1: RuntimeError: fell over"]
    assert missing.status == MISSING and missing.wrong() == ["nowhere: there is no benchmarks/nowhere.py"]
    assert "much" in (programs / "log.txt").read_text()


def test_files_of_other_programs_are_read_as_they_are(programs: Path) -> None:
    junk, wrong = outcome_of("junk.py", programs), outcome_of("wrong.py", programs)
    assert junk.status == OK and junk.content == {} and junk.summary() == "no results"
    assert wrong.summary() == "3 passed, 1 failed, 1 skipped; exit status 1: nothing printed"
    assert wrong.wrong() == ["failed: test_a: off by one"]
    stopped = outcome_of("stopped.py", programs)
    assert stopped.status == OUT_OF_TIME and stopped.wrong() == []
    assert stopped.summary() == "3 passed, 0 failed, 2 skipped"
    rows = Outcome("generation", OK, 1.0, 2, {"rows": [{"wrong": None}, {"wrong": "other tokens"}, "out of memory"]})
    assert rows.wrong() == ["WRONG: other tokens"] and rows.summary() == "3 rows"


def test_what_is_written_has_no_paths_of_this_machine() -> None:
    said = f"{ROOT}/kernels/a.py failed, under /tmp/cache-of-ours/b and {sys.prefix}/lib/c"
    outcome = Outcome("device", OK, 1.0, 15, {"machine": {"device": "made up"}, "said": said})
    found = gpu.merged([outcome], "abc-dirty", "/tmp/cache-of-ours")
    assert found["device"]["said"] == "kernels/a.py failed, under b and lib/c"
    assert found["machine"] == {"device": "made up", "sparq commit": "abc-dirty"}


@pytest.mark.parametrize("device", ("cuda", "cpu"))
def test_stages_find_the_checkout_first(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = gpu.environment_of(device, "/cache")
    first, *_, last = environment["PYTHONPATH"].split(os.pathsep)
    assert first == str(ROOT) and last == "/elsewhere" and environment["TRITON_CACHE_DIR"] == "/cache"
    assert "TRITON_INTERPRET" not in environment and environment["HF_HUB_OFFLINE"] == "1"


def content(rows: int, title: str) -> dict:
    table = {"title": title, "columns": ["shape", "µs"], "rows": [["a", "1"]] * rows, "left": 1, "printed": True}
    hidden = {**table, "title": "hidden", "printed": False}
    return {"tables": [table, hidden], "notes": [f"{title}: {number}" for number in range(30)]}


def test_at_most_so_many_lines_and_the_most_important_last() -> None:
    contents = {"attention": content(20, "first"), "generation": content(20, "second"), "kernels": content(60, "third")}
    outcomes = [Outcome(name, OUT_OF_TIME, 1.0, 2, found) for name, found in contents.items()]
    outcomes.append(Outcome("tests", FAILED, 1.0, 2, {"failed": [f"test {n} " + "x" * 999 for n in range(99)]}))
    found = gpu.merged(outcomes, None, "/cache")
    lines = gpu_report.report(found, 90)
    assert sum(-(-len(line) // gpu_report.WIDTH) for line in lines) <= 90
    titles = [line for line in lines if line in ("first", "second", "third", "hidden")]
    assert titles == ["second", "first"] and lines.index("1 tables are in gpu.md alone") < lines.index("second")
    assert "99 wrong" in lines and "NOT WHOLE: out of time: attention, generation, kernels" in lines
    assert any("89 more that are wrong" in line for line in lines)

    markdown = gpu_report.markdown(found)
    assert all(f"**{title}**" in markdown for title in ("first", "second", "third", "hidden"))
    assert "| tests | FAILED | 1 | 2 |" in markdown and "first: 29" in markdown


def test_wide_numbers_and_not_heads_make_columns_wide() -> None:
    table = {"title": "a title", "columns": ["shape", "a long head, of several words"], "rows": [["<b>[3]", "1.5"]]}
    drawn = gpu_report.draw(gpu_report.grid_of(table))
    assert max(map(len, drawn)) < 20 and drawn[-1].split() == ["<b>[3]", "1.5"]


@pytest.mark.parametrize(
    ("device", "expected"),
    (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ),
)
def test_a_card_has_a_short_name(device: str, expected: str) -> None:
    assert gpu_report.slug(device) == expected


def test_results_of_a_card_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Of a whole run on a card; the checkout may be one that cannot be written."""

    def run(stage, device, out, environment):
        found = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rows": [{}], **content(1, stage.name)}
        return Outcome(stage.name, OK, 1.0, stage.seconds, found)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    for arguments in (["--device", "cpu"], ["--stages", "attention"], []):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert ended.value.code == 0 and (tmp_path / "results").exists() == (not arguments)
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["gpu-h100.json", "gpu-h100.md"]
    kept = json.loads((tmp_path / "results" / "gpu-h100.json").read_text())
    assert kept == json.loads((tmp_path / "out" / "gpu.json").read_text())

    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "out" / "gpu.json" / "no folder")
    with pytest.raises(SystemExit):
        gpu.main()
    assert "could not be written" in capsys.readouterr().out


def test_without_a_device_it_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "STAGES", (replace(gpu.STAGES[0], seconds=120), *gpu.STAGES[1:]))  # of a busy machine
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    printed = capsys.readouterr().out
    log = (tmp_path / "log.txt").read_text()
    assert ended.value.code == 1 and printed.count("sees no CUDA device") == 2, printed + log
    assert list(json.loads((tmp_path / "gpu.json").read_text())["stages"]) == ["device"]


def test_a_replay_that_differs_is_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = sparq_kernels.decode, []

    def racing(*args, **kwargs):
        out = right(*args, **kwargs)
        calls.append(1)
        if len(calls) == 10:
            out.output.view(-1)[:2] = -out.output.view(-1)[:2]
        return out

    monkeypatch.setattr(sparq_kernels, "decode", racing)
    monkeypatch.setattr(gpu_races, "TINY", TINY[:1])
    stage = Stage("cpu", 600, tmp_path / "races.json")
    monkeypatch.setattr(gpu_races.Stage, "from_arguments", lambda *args: stage)
    gpu_races.main()
    found = json.loads((tmp_path / "races.json").read_text())
    assert [row["differing"]["output"] for row in found["rows"]] == [2, 0]
    assert found["wrong"] == ["RACE: tiny, goal float32: elements that differed in 20 replays: 2 of output"]
    assert "of them wrong" in found["said"] and found["rows"][1]["differing"].keys() == set(gpu_races.NAMES)


def test_races_are_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.tensor([0.0, -0.0, float("nan")])
    assert (gpu_races.bits(zeros) == gpu_races.bits(zeros.clone())).all()
    assert gpu_races.bits(zeros)[0] != gpu_races.bits(zeros)[1]


def test_races_out_of_time_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage("cpu", -600, tmp_path / "races.json")
    monkeypatch.setattr(gpu_races.Stage, "from_arguments", lambda *args: stage)
    gpu_races.main()
    found = json.loads((tmp_path / "races.json").read_text())
    assert found["wrong"] == [] and found["said"].endswith("no time for 4")


def test_programs_that_a_multiprocessor_holds() -> None:
    gpu_compile = compile_stage()
    assert gpu_compile.resident(registers=128, shared=0, warps=4) == 4
    assert gpu_compile.resident(registers=136, shared=0, warps=4) == 3, "what the plan launches no longer fits"
    assert gpu_compile.resident(registers=32, shared=100 << 10, warps=4) == 2
    assert gpu_compile.resident(registers=32, shared=0, warps=8) == 8
    assert gpu_compile.resident(registers=16, shared=0, warps=1) == 32


def test_the_kernels_of_all_stages_are_compiled_once() -> None:
    gpu_compile = compile_stage()
    jobs = gpu_compile.jobs_of(gpu_compile.attention_calls(), "sm_90")
    names = {job.kernel for job in jobs}
    assert {"score", "gather", "fused"} < names
    cases = {case for job in jobs for case in job.cases}
    assert {f"{case.name} {dtype}" for case in gpu_compile.CASES for dtype in ("bfloat16", "float16")} == cases
    more = gpu_compile.jobs_of(gpu_compile.generation_calls(), "sm_90")
    assert "append" in {job.kernel for job in more} and any("static" in case for job in more for case in job.cases)


def test_the_kernels_of_the_tests_are_compiled_too() -> None:
    gpu_compile = compile_stage()
    cases = gpu_compile.cases_of_tests(Stage("cuda", 600, None))
    assert len(cases) > 100 and gpu_compile.cases_of_tests(Stage("cpu", 600, None)) == cases[:1]
    assert gpu_compile.build_test(*cases[0], "sm_90", 132) >= 6  # fused, score, select, three more, gather


def test_a_kernel_that_cannot_be_compiled_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_compile = compile_stage()
    (job, *_) = gpu_compile.jobs_of(gpu_compile.tiny_calls(), "sm_90")

    def refuse(specialised):
        raise ValueError("no such instruction")

    monkeypatch.setattr(gpu_compile.compiled_kernels, "resources", refuse)
    _, found = gpu_compile.build(0, job, "sm_90", 132)
    stage = Stage("cpu", 600, tmp_path / "kernels.json")
    stage.content.update(target="sm_90", multiprocessors=132)
    gpu_compile.report(stage, [{"kernel": job.kernel, "cases": job.cases, "programs": [8], "registers": None, **found}])
    (line,) = json.loads((tmp_path / "kernels.json").read_text())["wrong"]
    assert line == f"{job.kernel} of tiny cannot be compiled: ValueError: no such instruction"


def compile_stage():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    import gpu_compile

    return gpu_compile
