import unittest

from compare.results import Requirement, Results, geomean
from compare.samples import Sample


def results(**costs):
    """One workload "w" with the costs of each side."""
    made = Results()
    for side, values in costs.items():
        for value in values:
            made.add(side, Sample("w", 10, value * 10, "c0"))
    return made


class Ratios(unittest.TestCase):
    def test_are_of_minima_and_of_medians(self):
        ratio = results(lodge=[2, 1, 4], qemu=[8, 3, 5]).ratio("w", "qemu", "lodge")
        self.assertEqual((ratio.min, ratio.median), (3, 2.5))

    def test_need_both_sides(self):
        self.assertIsNone(results(lodge=[1]).ratio("w", "qemu", "lodge"))

    def test_geomean(self):
        self.assertAlmostEqual(geomean([2, 8]), 4)

    def test_a_mean_over_workloads_needs_all_of_them(self):
        made = results(lodge=[1], qemu=[4])
        self.assertAlmostEqual(made.mean_ratio(["w"], "qemu", "lodge").min, 4)
        self.assertIsNone(made.mean_ratio(["w", "missing"], "qemu", "lodge"))


class Checksums(unittest.TestCase):
    def test_that_agree_are_no_news(self):
        self.assertEqual(results(native=[1], lodge=[1, 2], qemu=[3]).disagreements(), [])

    def test_that_differ_between_sides_are_reported(self):
        made = results(native=[1])
        made.add("lodge", Sample("w", 10, 1, "c1"))
        self.assertEqual(made.disagreements(), ["w: results differ: native c0, lodge c1"])

    def test_that_differ_between_rounds_are_reported(self):
        made = results(lodge=[1])
        made.add("lodge", Sample("w", 10, 1, "c1"))
        self.assertEqual(made.disagreements(), ["w: results differ: lodge c0 and c1"])


class Requirements(unittest.TestCase):
    def test_relations(self):
        for relation, met in (("at least", True), ("at most", True), ("more than", False), ("less than", False)):
            with self.subTest(relation):
                self.assertIs(Requirement("", 1.0, relation, 1.0).met, met)
        self.assertFalse(Requirement("", 0.9, "at least", 1.0).met)
        self.assertFalse(Requirement("", 1.1, "at most", 1.0).met)

    def test_not_measured_is_neither(self):
        self.assertIsNone(Requirement("", None, "at least", 1.0).met)


if __name__ == "__main__":
    unittest.main()
