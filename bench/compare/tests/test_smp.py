import pathlib
import subprocess
import tempfile
import unittest

from compare.results import Results
from compare.samples import Sample
from compare.smp import Smp, source
from tests.test_programs import PROGRAMS


def measured(**seconds):
    results = Results()
    for side, (one, two, *shared) in seconds.items():
        results.add(side, Sample("compile, 1 CPU", 1, one))
        results.add(side, Sample("compile, 2 CPUs", 1, two))
        for both_on_one in shared:
            results.add(side, Sample("compile, 1 CPU, 2 jobs", 1, both_on_one))
    return results


class SpeedUp(unittest.TestCase):
    def test_is_compared_with_the_other_sides(self):
        group = Smp(pathlib.Path())
        results = measured(native=(2, 1), lodge=(19, 10), qemu=(15, 10))
        self.assertAlmostEqual(group.derived(results)["speed-up of make -j"]["lodge"].min, 1.9)
        over_tcg, over_host = group.requirements(results)
        self.assertAlmostEqual(over_tcg.value, 1.9 / 1.5)
        self.assertAlmostEqual(over_host.value, 0.95)

    def test_of_two_jobs_on_one_processor_is_told_apart(self):
        found = Smp(pathlib.Path()).derived(measured(qemu=(15, 10, 23)))
        self.assertAlmostEqual(found["speed-up of make -j"]["qemu"].min, 1.5)
        self.assertAlmostEqual(found["speed-up of 2 jobs"]["qemu"].min, 2.3)

    def test_says_nothing_on_a_busy_host(self):
        results = measured(native=(2, 1.9), lodge=(19, 10), qemu=(15, 10))
        for wanted in Smp(pathlib.Path()).requirements(results):
            self.assertIsNone(wanted.value)
            self.assertIn("the host is busy, its own speed-up is 1.05", wanted.text)

    def test_needs_the_other_side(self):
        over_tcg, _ = Smp(pathlib.Path()).requirements(measured(native=(2, 1), lodge=(19, 10)))
        self.assertIsNone(over_tcg.value)


@unittest.skipUnless(PROGRAMS, "COMPARE_PROGRAMS is not set")
class Compile(unittest.TestCase):
    """With the system's compiler, as the driver's may not have been fetched."""

    def run_it(self, directory, jobs, compiler):
        command = [pathlib.Path(PROGRAMS, "compile"), jobs, "2", "2", directory, *compiler]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def test_compiles_what_we_generate_and_sees_a_failure(self):
        with tempfile.TemporaryDirectory() as directory:
            for unit in (0, 1):
                pathlib.Path(directory, f"unit{unit}.c").write_text(source(unit, functions=3))
            done = self.run_it(directory, "3", ["/usr/bin/cc", "-c"])
            self.assertRegex(done.stdout, r"^compile 3 \d+\.\d{9} [0-9a-f]{16}\n$")
            self.assertTrue(pathlib.Path(directory, "out2.o").exists())
            pathlib.Path(directory, "unit1.c").write_text("not C")
            self.assertEqual(self.run_it(directory, "3", ["/usr/bin/cc", "-c"]).returncode, 1)


if __name__ == "__main__":
    unittest.main()
