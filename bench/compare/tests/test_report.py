import json
import unittest

from compare import report
from compare.groups import Programs
from compare.results import Results
from compare.samples import Sample
from compare.units import EACH, rate


def measured():
    results = Results()
    for side, seconds in (("native", 1.0), ("lodge", 2.0), ("qemu", 4.0)):
        for workload in ("one", "two"):
            results.add(side, Sample(workload, 1000, seconds, "c0"))
            results.add(side, Sample(workload, 1000, seconds * 3, "c0"))
    return results


GROUP = Programs("integer", {"one": 1, "two": 1}, faster=1.6, slower=1.5, none_slower=True)


class Table(unittest.TestCase):
    def test_has_costs_ratios_and_the_mean(self):
        self.assertEqual(
            report.rows(GROUP, measured())[1],
            ["one", "1.00 ms / 2.00 ms", "2.00 ms / 4.00 ms", "4.00 ms / 8.00 ms", "2.00x / 2.00x", "2.00x / 2.00x"],
        )
        self.assertEqual(report.rows(GROUP, measured())[-1], ["geomean", "", "", "", "2.00x / 2.00x", "2.00x / 2.00x"])

    def test_columns_are_aligned(self):
        self.assertEqual(report.align([["a", "b"], ["long", "x"], ["c", "wide"]]), "a        b\nlong     x\nc     wide")

    def test_says_what_is_met(self):
        text = report.text(GROUP, measured())
        self.assertIn("geomean, times faster than TCG: 2.00, required at least 1.6: met", text)
        self.assertIn("geomean, times slower than native: 2.00, required at most 1.5: NOT MET", text)
        self.assertIn("worst, times faster than TCG: 2.00, required at least 1: met", text)

    def test_a_side_that_failed_leaves_a_gap_and_its_reason(self):
        results = Results()
        results.add("lodge", Sample("one", 1, 1.0, "c0"))
        results.fail("qemu", "its output ended")
        text = report.text(GROUP, results)
        self.assertIn("FAILED on qemu: its output ended", text)
        self.assertIn("geomean, times faster than TCG: not measured", text)

    def test_wrong_results_are_shown(self):
        results = measured()
        results.add("lodge", Sample("one", 1, 1.0, "c1"))
        self.assertIn("WRONG one: results differ", report.text(GROUP, results))


class Json(unittest.TestCase):
    def test_has_all_that_was_measured(self):
        out = json.loads(json.dumps(report.json(GROUP, measured())))
        one = out["workloads"]["one"]
        self.assertEqual(one["lodge"], {"unit": "s", "min": 0.002, "median": 0.004, "all": [0.002, 0.006],
                                        "checksums": ["c0"]})  # fmt: skip
        self.assertEqual(one["faster_than_tcg"], {"min": 2.0, "median": 2.0})
        self.assertEqual(out["requirements"][0]["met"], True)
        self.assertAlmostEqual(out["geomean"]["slower_than_native"]["min"], 2.0)


class Units(unittest.TestCase):
    def test_durations_have_three_digits(self):
        for cost, shown in ((2.5, "2.50 s"), (0.0123, "12.3 ms"), (123.4e-6, "123 us"), (5e-9, "5.00 ns")):
            self.assertEqual(EACH.show(cost), shown)

    def test_rates_are_inverse(self):
        self.assertEqual(rate("MB/s", 1e-6).show(1 / 250e6), "250 MB/s")


if __name__ == "__main__":
    unittest.main()
