"""The wheel holds both packages, the command and the C++ source, and works outside the checkout."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LINKS = {"link_open", "image"}


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
    assert {"sparq_command.py", "sparq_vllm.py"} <= names
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "[vllm.general_plugins]\nsparq = sparq_vllm:register" in zipfile.ZipFile(wheel).read(entry_points).decode()
    # Hugging Face publishes a package `kernels` that transformers imports.
    assert not any(name.startswith("kernels") for name in names)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def links(text):
    """Where the links and images of a Markdown text go."""
    inline = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "inline"]
    parts = [part for token in inline for part in token.children]
    return [part.attrs["href" if part.type == "link_open" else "src"] for part in parts if part.type in LINKS]


def test_the_package_index_gets_no_relative_link_or_image(wheel):
    description = metadata(wheel).get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    absolute = [link for link in links(readme) if link.startswith("https://")]
    assert len(absolute) >= 2 and len(links(readme)) > len(absolute), "there is something to leave out"
    assert links(description) == absolute
    assert metadata(wheel)["Description-Content-Type"] == "text/markdown"
    fences = [[t.content for t in MarkdownIt().parse(text) if t.type == "fence"] for text in (readme, description)]
    assert fences[0] == fences[1]
    # All the rest of the text is there: only whole images and the targets of links are shorter.
    assert description.count("\n## ") == readme.count("\n## ") and len(description) > 0.95 * len(readme)
    assert "all other cases in\ntables.md, and" in description


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/cpu.md", "docs/speed.md", "docs/support.md"])
def test_the_files_that_a_text_links_exist(name):
    relative = [link for link in links((ROOT / name).read_text(encoding="utf-8")) if "://" not in link]
    assert relative or name == "CONTRIBUTING.md"
    assert all((ROOT / name).parent.joinpath(link).is_file() for link in relative)


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
