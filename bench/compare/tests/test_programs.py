"""The built programs themselves; COMPARE_PROGRAMS is where they are."""

import hashlib
import os
import pathlib
import subprocess
import unittest

from compare.catalog import FLOAT, INTEGER, SYSTEM, X87
from compare.samples import parse_program

PROGRAMS = os.environ.get("COMPARE_PROGRAMS", "")


def run(name, iterations):
    program = pathlib.Path(PROGRAMS, name.replace("-", "_"))
    done = subprocess.run([program, str(iterations)], capture_output=True, text=True, timeout=60)
    if done.returncode == 3:
        raise unittest.SkipTest(done.stderr)  # the processor lacks what the program is about
    done.check_returncode()
    return parse_program(name, done.stdout)[0]


@unittest.skipUnless(PROGRAMS, "COMPARE_PROGRAMS is not set")
class Programs(unittest.TestCase):
    def test_print_a_measurement_whose_checksum_depends_on_the_work_alone(self):
        for name in (*INTEGER, *FLOAT, *X87, *SYSTEM):
            with self.subTest(name):
                first, again, more = run(name, 3), run(name, 3), run(name, 4)
                self.assertEqual(first.work, 3)
                self.assertEqual(first.checksum, again.checksum)
                self.assertNotEqual(first.checksum, more.checksum)

    def test_hash_is_sha256(self):
        message = bytearray((i * 7 + (i >> 8)) & 0xFF for i in range(65536))
        digest = bytes(32)
        for _ in range(3):
            message[:32] = digest
            digest = hashlib.sha256(message).digest()
        self.assertEqual(run("hash", 3).checksum, digest[:8].hex())

    def test_refuse_to_measure_nothing(self):
        done = subprocess.run([pathlib.Path(PROGRAMS, "sort")], capture_output=True, timeout=60)
        self.assertEqual(done.returncode, 2)


if __name__ == "__main__":
    unittest.main()
