import pathlib
import tempfile
import unittest

from compare.lab import Unavailable
from compare.samples import BadOutput
from compare.tools import parse_7z, parse_openssl, parse_sysbench, parse_zstd, unpack


class Output(unittest.TestCase):
    def test_openssl(self):
        output = "+DT:AES-256-GCM:1:8192\n+R:138092:AES-256-GCM:1.010000\n+H:8192\n+F:25:AES-256-GCM:1131249664.00\n"
        (sample,) = parse_openssl("aes", output)
        self.assertEqual((sample.work, sample.seconds), (138092 * 8192, 1.01))

    def test_zstd_gives_the_last_of_its_progress(self):
        output = "\r   3#Synthetic 50%     :  10000000 ->\r 3#Synthetic : 3230847 (x3.095),   57.0 MB/s,  540.0 MB/s" \
                 "\r 3#Synthetic : 3230847 (x3.095),   57.1 MB/s,  541.3 MB/s\r 3#\n"  # fmt: skip
        self.assertEqual([(s.workload, s.work) for s in parse_zstd(output)],
                         [("zstd compress", 57.1e6), ("zstd decompress", 541.3e6)])  # fmt: skip

    def test_7z(self):
        output = "18:       2652    59   3980   2363  |      49033    99   3999   3965\n\n" \
                 "Avr:      2600    59   3980   2363  |      49000    99   3999   3965\nTot:  79   3990   3164\n"
        self.assertEqual([s.work for s in parse_7z(output)], [2600 * 1024, 49000 * 1024])

    def test_sysbench(self):
        output = "    total time:                          2.0003s\n    total number of events:              4038\n"
        (sample,) = parse_sysbench("memory", 1024, output)
        self.assertEqual((sample.work, sample.seconds), (4038 * 1024, 2.0003))

    def test_without_a_result_is_an_error(self):
        named = (lambda out: parse_openssl("x", out), lambda out: parse_sysbench("x", 1, out))
        for parse in (parse_zstd, parse_7z, *named):
            with self.assertRaises(BadOutput):
                parse("Illegal instruction")


class Unpack(unittest.TestCase):
    def test_brings_a_program_and_its_libraries_only(self):
        with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
            tools, root = pathlib.Path(source), pathlib.Path(target)
            files = {"bin/one": "1", "lib/libone.so": "l", "lib/libtwo.so": "l", "needs/one": "libone.so\n"}
            for path, text in files.items():
                (tools / path).parent.mkdir(exist_ok=True)
                (tools / path).write_text(text)
            unpack(tools, ["one"], root)
            self.assertEqual([path.name for path in (root / "lib").iterdir()], ["libone.so"])
            self.assertEqual((root / "tools/one").stat().st_mode & 0o777, 0o755)

    def test_says_what_to_do_without_the_packages(self):
        with tempfile.TemporaryDirectory() as target, self.assertRaisesRegex(Unavailable, "fetch-guests tools"):
            unpack(pathlib.Path("/nonexistent"), ["one"], pathlib.Path(target))


if __name__ == "__main__":
    unittest.main()
