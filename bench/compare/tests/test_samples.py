import unittest

from compare.samples import BadOutput, Sample, implausible, parse_program


class ProgramOutput(unittest.TestCase):
    def test_gives_work_seconds_and_checksum(self):
        samples = parse_program("fork-exit", "fork-exit 1000 2.500000000 00000000deadbeef\n")
        self.assertEqual(samples, [Sample("fork-exit", 1000, 2.5, "00000000deadbeef")])
        self.assertEqual(samples[0].cost, 0.0025)

    def test_may_lie_between_kernel_messages(self):
        output = "[   1.0] random: crng init done\nsort 2 0.500000000 0123456789abcdef\n[   2.0] clocksource: tsc"
        self.assertEqual(parse_program("sort", output)[0].seconds, 0.5)

    def test_without_a_result_is_an_error(self):
        for output in ("", "Segmentation fault", "sort 2 0.5", "hash 2 0.500000000 0123456789abcdef"):
            with self.subTest(output), self.assertRaises(BadOutput):
                parse_program("sort", output)

    def test_with_two_results_is_an_error(self):
        with self.assertRaises(BadOutput):
            parse_program("sort", "sort 2 0.500000000 0123456789abcdef\n" * 2)

    def test_of_nothing_measured_is_an_error(self):
        for line in ("sort 0 0.500000000 0123456789abcdef", "sort 2 0.000000000 0123456789abcdef"):
            with self.subTest(line), self.assertRaises(BadOutput):
                parse_program("sort", line)


class GuestClock(unittest.TestCase):
    def test_that_agrees_is_believed(self):
        self.assertEqual(implausible(5.0, 5.1), "")

    def test_that_runs_fast_is_not(self):
        self.assertIn("only 4.000 s passed", implausible(5.0, 4.0))

    def test_that_runs_slow_is_not(self):
        self.assertIn("10.000 s passed", implausible(5.0, 10.0))


if __name__ == "__main__":
    unittest.main()
