import pathlib
import subprocess
import tempfile
import unittest

from compare import guest, initramfs, native
from compare.guest import Console, MachineFailed
from compare.lab import StepFailed, read
from compare.plan import Outcome, Shape, Step
from compare.samples import parse_program


def step(name, *command, limit=10):
    return Step(name, command, lambda output: parse_program(name, output), limit=limit)


def run(script, *steps):
    """A shell script in the place of a VM."""
    with Console(["/bin/sh", "-c", script]) as console:
        return guest.run_steps(console, list(steps))


class Guest(unittest.TestCase):
    def test_steps_are_read_from_the_console(self):
        outcomes = run(
            "printf 'SeaBIOS\\r\\ncompare: userland\\r\\ncompare: begin one\\r\\nhello\\r\\nthere\\r\\n';"
            "sleep 0.2; printf 'compare: end one 3\\r\\ncompare: done\\r\\n'",
            step("one"),
        )
        self.assertEqual((outcomes[0].output, outcomes[0].status), ("hello\nthere", 3))
        self.assertGreater(outcomes[0].outside, 0.19)

    def test_a_machine_that_dies_is_reported_with_its_last_words(self):
        with self.assertRaisesRegex(MachineFailed, "(?s)its output ended.*status 8.*Kernel panic.*accelerator"):
            run("echo 'compare: userland'; echo 'Kernel panic'; echo 'accelerator stopped' >&2; exit 8", step("one"))

    def test_a_step_that_does_not_end_is_given_up(self):
        with self.assertRaisesRegex(MachineFailed, "no answer in time"):
            run("echo 'compare: userland'; echo 'compare: begin one'; sleep 30", step("one", limit=0.2))

    def test_a_machine_that_ends_with_an_error_is_not_a_success(self):
        with self.assertRaisesRegex(MachineFailed, "ended wrongly"):
            run("echo 'compare: userland'; echo 'compare: done'; exit 6")

    def test_the_process_is_gone_afterwards(self):
        with Console(["/bin/sleep", "60"]) as console:
            pid = console.pid
        self.assertFalse(pathlib.Path(f"/proc/{pid}").exists())


class Engine(unittest.TestCase):
    def test_is_passed_on_only_when_given(self):
        self.assertNotIn("--engine", guest.lodge(pathlib.Path("lodge"), None).command)
        self.assertEqual(guest.lodge(pathlib.Path("lodge"), "translate").command[-2:], ("--engine", "translate"))


class Native(unittest.TestCase):
    def test_runs_below_the_directory_of_the_files(self):
        with tempfile.TemporaryDirectory() as directory:
            pathlib.Path(directory, "note").write_text("here")
            outcomes = native.run_steps(pathlib.Path(directory), Shape(), [step("one", "cat", "{root}/note")])
        self.assertEqual((outcomes[0].output, outcomes[0].status), ("here", 0))


class Reading(unittest.TestCase):
    def outcome(self, seconds, outside, status=0):
        return Outcome(step("sort"), f"sort 2 {seconds:.9f} 0123456789abcdef", status, outside)

    def test_gives_the_sample(self):
        self.assertEqual(read(self.outcome(1.0, 1.1))[0].seconds, 1.0)

    def test_refuses_a_failed_program(self):
        with self.assertRaisesRegex(StepFailed, "status 139"):
            read(self.outcome(1.0, 1.1, status=139))

    def test_refuses_a_clock_that_cannot_be_right(self):
        with self.assertRaisesRegex(StepFailed, "only 0.500 s passed"):
            read(self.outcome(1.0, 0.5))


class Initramfs(unittest.TestCase):
    def test_is_what_cpio_unpacks(self):
        archive = initramfs.pack([initramfs.directory("bin"), initramfs.file("bin/one", b"odd", 0o750),
                                  initramfs.link("bin/two", "one"), initramfs.file("empty", b"")])  # fmt: skip
        with tempfile.TemporaryDirectory() as name:
            subprocess.run(["cpio", "--quiet", "-id"], input=archive, cwd=name, check=True)
            root = pathlib.Path(name)
            self.assertEqual((root / "bin/two").read_bytes(), b"odd")
            self.assertEqual((root / "bin/one").stat().st_mode & 0o7777, 0o750)
            self.assertEqual((root / "empty").read_bytes(), b"")
            self.assertEqual([entry.path for entry in initramfs.tree(root)], ["bin", "bin/one", "bin/two", "empty"])


if __name__ == "__main__":
    unittest.main()
