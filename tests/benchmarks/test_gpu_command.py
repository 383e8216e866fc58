"""`make gpu` with no GPU: its dry run on a bare installation, and its parts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import sparq_kernels
import torch
from gpu_stages import races
from gpu_stages import report as gpu_report
from gpu_stages.cases import MEASURED, RACES, TINY
from gpu_stages.generation import GPU_WAYS, KNOBS
from gpu_stages.report import FAILED, OK, OUT_OF_TIME, Outcome
from gpu_stages.stage import Limits, Stage
from models import from_config
from opponents import make_runner
from sparq_kernels import cpu
from tables import Grid
from transformers import LlamaConfig
from workload import decode, make_inputs

import sparq

pytestmark = pytest.mark.slow

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
    """The environment of an installation without SparQ, and with somebody else's `tests` and `tables` at the end of
    its path."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    for folder in (site, elsewhere / "tests", elsewhere / "tables"):
        folder.mkdir(parents=True)
    for name in ("tests", "tables"):
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
    "stopped.py": 'write({"said": "3 passed", "timed_out": True}); sys.exit(1)',
    "wrong.py": 'write({"said": "3 passed", "wrong": ["failed: test_a"]}); sys.exit(1)',
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def command(stage: Limits, device: str, path: Path) -> list[str]:
        return [sys.executable, str(tmp_path / f"{stage.name}.py"), str(path)]

    monkeypatch.setattr(gpu, "command", command)
    head = (
        "import json, subprocess, sys, time\n"
        "path = sys.argv[1]\n"
        "write = lambda content: open(path, 'w').write(json.dumps(content))\n"
    )
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(head + textwrap.dedent(body) + "\n")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def outcome_of(name: str, out: Path, seconds: int = 30) -> Outcome:
    return gpu.run(Limits(name, "about", seconds), "cpu", out, dict(os.environ))


def test_a_late_stage_is_stopped_with_its_children_and_keeps_its_rows(programs: Path) -> None:
    children = [programs / f"late.json.{name}" for name in ("child", "other")]
    outcome = outcome_of("late", programs, seconds=5)
    log = (programs / "log.txt").read_text()
    assert outcome.status == OUT_OF_TIME and outcome.content.get("rows") == [1], (outcome, log)
    assert 5 <= outcome.seconds < 20, outcome
    assert outcome.wrong() == [], "it is told, and is not wrong"
    written = [child.read_text() for child in children]
    time.sleep(0.2)
    assert [child.read_text() for child in children] == written, "they are dead"
    assert sorted(path.name for path in programs.iterdir()) == ["late.json.child", "late.json.other", "log.txt"]


def test_a_stage_that_breaks_down_is_wrong(programs: Path) -> None:
    crash = outcome_of("crash", programs)
    assert crash.status == FAILED and crash.wrong() == ["crash: exit status 1: RuntimeError: fell over"]
    assert "much" in (programs / "log.txt").read_text()
    wrong = outcome_of("wrong", programs)
    assert wrong.summary() == "3 passed; exit status 1: nothing printed" and wrong.wrong() == ["failed: test_a"]


def test_a_stage_that_has_stopped_something_is_out_of_time(programs: Path) -> None:
    stopped = outcome_of("stopped", programs)
    assert stopped.status == OUT_OF_TIME and stopped.wrong() == [] and stopped.summary() == "3 passed"


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
    outcomes.append(Outcome("tests", FAILED, 1.0, 2, {"wrong": [f"test {n} " + "x" * 999 for n in range(99)]}))
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
    drawn = gpu_report.draw(Grid("a title", ("shape", "a long head, of several words"), [("<b>[3]", "1.5")]))
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
    monkeypatch.setattr(races, "TINY", TINY[:1])
    races.main(Stage("cpu", 600, tmp_path / "races.json"))
    found = json.loads((tmp_path / "races.json").read_text())
    assert [row["differing"]["output"] for row in found["rows"]] == [2, 0]
    assert found["wrong"] == ["RACE: tiny, goal float32: elements that differed in 20 replays: 2 of output"]
    assert "of them wrong" in found["said"] and found["rows"][1]["differing"].keys() == set(races.NAMES)


def test_races_are_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.tensor([0.0, -0.0, float("nan")])
    assert (races.bits(zeros) == races.bits(zeros.clone())).all()
    assert races.bits(zeros)[0] != races.bits(zeros)[1]


def test_with_codes_a_mass_decides_in_races() -> None:
    (case,) = (case for case in TINY if case.shape.index == "int4")
    x = make_inputs(case.shape, torch.float32)
    all_k = decode(case.shape, x).output
    assert not torch.equal(races.results(case.shape, x, False)[0], all_k)
    indices = {(case.name, dtype) for case, dtype in RACES}
    assert {("S3", "bfloat16"), ("S3 int4", "bfloat16"), ("16k int4", "float16")} < indices


def test_races_out_of_time_are_told(tmp_path: Path) -> None:
    races.main(Stage("cpu", -600, tmp_path / "races.json"))
    found = json.loads((tmp_path / "races.json").read_text())
    assert found["wrong"] == [] and found["said"].endswith("no time for 6")


def test_programs_that_a_multiprocessor_holds() -> None:
    kernels = compile_stage()
    assert kernels.resident(registers=128, shared=0, warps=4) == 4
    assert kernels.resident(registers=136, shared=0, warps=4) == 3, "what the plan launches no longer fits"
    assert kernels.resident(registers=32, shared=100 << 10, warps=4) == 2
    assert kernels.resident(registers=32, shared=0, warps=8) == 8
    assert kernels.resident(registers=16, shared=0, warps=1) == 32


def test_the_kernels_of_all_stages_are_compiled_once() -> None:
    kernels = compile_stage()
    jobs = kernels.jobs_of(kernels.attention_calls(), "sm_90")
    names = {job.kernel for job in jobs}
    assert {"score", "gather", "fused", "encode", "trim"} < names
    cases = {case for job in jobs for case in job.cases}
    raced = {f"{case.name} {dtype}, mass" for case, dtype in RACES if case.shape.index == "int4"}
    assert {f"{case.name} {dtype}" for case, dtype in MEASURED} | raced == cases and raced
    assert {case for job in jobs if job.kernel == "encode" for case in job.cases} == {
        case for case in cases - raced if "int4" in case
    }
    more = kernels.jobs_of(kernels.generation_calls(), "sm_90")
    assert {"append", "encode"} < {job.kernel for job in more}
    assert any("static" in case for job in more for case in job.cases)


def test_the_kernels_of_generation_are_those_of_its_knobs() -> None:
    kernels = compile_stage()
    config = sparq.SparqConfig(**KNOBS)
    assert config.index == "int4" and config.stop_at is None, "random keys would be read up to the mass's cap"
    for call in kernels.generation_calls():
        options = dict(call.options)
        if call.kind == "decode":
            budget = config.budget(config.components(options["head_dim"]))
            assert (options["r"], options["k"], options["k_divisor"]) == (budget.r, budget.k, budget.k_divisor)
        for one in call.launches("sm_90"):
            names = one.kernel.arg_names
            assert "CODED" not in names or dict(zip(names, one.arguments, strict=True))["CODED"]


@pytest.mark.parametrize("way", ["SparQ dynamic", "SparQ static, graph"])
def test_what_generation_launches_is_compiled_ahead(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's calls on the CPU, as a GPU would launch them."""
    kernels = compile_stage()
    if sparq_kernels.backend("cpu") != "cpp":
        pytest.skip("there is no kernel whose calls could be watched")

    def keys(launches):
        return {kernels.specialise(one, "sm_90").key: one.kernel.__name__ for one in launches}

    def note(name: str, what: str, place: int) -> None:
        module = importlib.import_module(name)  # the package has functions of these names
        real = getattr(module, what)

        def noted(*arguments, **options):
            launched.update(keys(kernels.record(kernels.launch, arguments[place], "sm_90")))
            return real(*arguments, **options)

        monkeypatch.setattr(module, what, noted)

    ahead = keys(one for call in kernels.generation_calls() for one in call.launches("sm_90"))
    launched: dict[str, str] = {}
    note("sparq_kernels.cpu", "run", 1)
    note("sparq_kernels.cpu", "encode", 0)
    note("sparq_kernels.append", "check_append", 0)
    note("sparq_kernels.value_sum", "check_extending", 0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    )
    model = from_config(config, torch.bfloat16, "cpu")
    (chosen,) = (each for each in GPU_WAYS if each.name == way)
    cpu.serve(None)  # every call comes through Python
    try:
        make_runner(model, chosen, 16384, 1, 13, KNOBS).decode(2)
    finally:
        cpu.serve(cpu.kernel())
    missed = [name for key, name in launched.items() if key not in ahead]
    assert not missed and {"score", "gather", "append", "encode"} <= set(launched.values())


def test_the_kernels_of_the_tests_are_compiled_too() -> None:
    kernels = compile_stage()
    cases = kernels.cases_of_tests(Stage("cuda", 600, Path()))
    assert len(cases) > 100 and kernels.cases_of_tests(Stage("cpu", 600, Path())) == cases[:1]
    assert kernels.build_test(*cases[0], "sm_90", 132) >= 8  # score and fused of either index, and those of both


def test_a_kernel_that_cannot_be_compiled_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = compile_stage()
    (job, *_) = kernels.jobs_of(kernels.tiny_calls(), "sm_90")

    def refuse(specialised):
        raise ValueError("no such instruction")

    monkeypatch.setattr(kernels.compiled_kernels, "resources", refuse)
    _, found = kernels.build(0, job, "sm_90", 132)
    stage = Stage("cpu", 600, tmp_path / "kernels.json")
    stage.content.update(target="sm_90", multiprocessors=132)
    kernels.report(stage, [{"kernel": job.kernel, "cases": job.cases, "programs": [8], "registers": None, **found}])
    (line,) = json.loads((tmp_path / "kernels.json").read_text())["wrong"]
    assert line == f"{job.kernel} of tiny cannot be compiled: ValueError: no such instruction"


def compile_stage():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    from gpu_stages import kernels

    return kernels
