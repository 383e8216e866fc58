"""The wheel holds both packages, the command and the C++ source, and works outside the checkout."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(name))


def test_wheel_holds_packages_command_and_sources(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in (("sparq", ROOT / "sparq"), ("sparq_kernels", ROOT / "kernels" / "sparq_kernels")):
        for path in folder.rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".typed"}:
                assert f"{package}/{path.relative_to(folder)}" in names
    assert "sparq_command.py" in names
    # Hugging Face publishes a package `kernels` that transformers imports.
    assert not any(name.startswith("kernels") for name in names)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_the_extra_for_gpus_and_the_developers_one_bring_triton(wheel):
    requirements = metadata(wheel).get_all("Requires-Dist")
    triton = [line for line in requirements if line.startswith("triton")]
    assert len(triton) == 1 and 'extra == "gpu"' in triton[0] and 'sys_platform == "linux"' in triton[0]
    (developers,) = (line for line in requirements if line.startswith("sparq-attention[gpu]"))
    assert 'extra == "dev"' in developers


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import sparq, sparq_kernels; print(sparq.__file__, sparq_kernels.__file__, sparq_kernels.backend('cpu'))"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    sparq_file, kernels_file, backend = run.stdout.split()
    assert Path(sparq_file).is_relative_to(tmp_path) and Path(kernels_file).is_relative_to(tmp_path)
    assert backend == "cpp"
