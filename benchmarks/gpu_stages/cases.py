"""What is measured on a GPU: shapes, goals, and what an H100 was predicted to take."""

from __future__ import annotations

from dataclasses import replace

from workload import Case, Shape

S1 = Case("S1", Shape(64, 32, 32, 128, 4096, 32, 128), 3.5, (290, 1430))
S2 = Case("S2", Shape(8, 32, 8, 128, 32768, 32, 256), 4.0, (87, 365))
S3 = Case("S3", Shape(1, 32, 8, 128, 131072, 32, 1024), 3.5, (48, 187))
ONE_ROW = Case("16k", Shape(1, 32, 8, 128, 16384, 32, 256), 1.1, (26, 29))
# The README's rows first, then those of the plugin's own ratio of 8: r = d / 8, k = S / 16.
CASES = (
    S1,
    S2,
    S3,
    Case("4k", Shape(1, 32, 8, 128, 4096, 32, 128)),
    ONE_ROW,
    Case("32k", Shape(1, 32, 8, 128, 32768, 32, 256)),
    Case("16k/8", Shape(1, 32, 8, 128, 16384, 16, 1024)),
    Case("64k/8", Shape(1, 32, 8, 128, 65536, 16, 4096), 2.5, (34, 96)),
    Case("128k/8", Shape(1, 32, 8, 128, 131072, 16, 8192), predicted=(46, 187)),
)


def coded(case: Case) -> Case:
    """The same by codes of four bits, of which the plugin's own ratio takes four times the components."""
    shape = case.shape
    r = 4 * shape.r if case.name.endswith("/8") else shape.r
    return Case(f"{case.name} int4", replace(shape, r=r, index="int4"))


def by_either_index(*cases: Case) -> list[Case]:
    return [each for case in cases for each in (case, coded(case))]


# In the order of their worth, should the time not suffice. The two dtypes differ little.
MEASURED = [(case, "bfloat16") for case in by_either_index(*CASES)]
MEASURED += [(case, "float16") for case in by_either_index(S1, S2, S3)]
PROFILED = by_either_index(S1, S2, S3, ONE_ROW)
RACES = [(case, "bfloat16") for case in by_either_index(S2, S3, ONE_ROW)]
RACES += [(case, "float16") for case in by_either_index(ONE_ROW)]
RACES_MASS = 0.2  # with codes: of random keys that is less than all k have

# For a dry run on a CPU: as many branches as can be had of hardly any work.
TINY = (
    Case("tiny, goal", Shape(2, 4, 2, 16, 96, 8, 12), 1.0, (1, 2)),
    Case("tiny", Shape(1, 2, 2, 16, 64, 8, 8)),
    Case("tiny int4", Shape(1, 4, 2, 16, 300, 8, 12, "int4")),
)
