import unittest

from compare.memory import Mapping, parse_smaps, split

SMAPS = """\
557e2d73d000-557e2d852000 r-xp 0000f000 fe:00 5333415                    /work/build/lodge
Size:               1108 kB
KernelPageSize:        4 kB
Rss:                1108 kB
Pss:                1100 kB
VmFlags: rd ex mr mw me sd
7fbd2d41b000-7fbd4d41b000 rw-s 00000000 00:01 199694                     /memfd:lodge-ram (deleted)
Size:             524288 kB
Rss:               81008 kB
Pss:               80000 kB
7fbd50000000-7fbd50001000 rw-p 00000000 00:00 0
Size:                  4 kB
Rss:                   4 kB
Pss:                   4 kB
"""


class Smaps(unittest.TestCase):
    def test_are_read(self):
        self.assertEqual(parse_smaps(SMAPS)[1], Mapping("rw-s", "00:01 199694", 524288, 80000))

    def test_are_split_into_the_guests_and_the_rest(self):
        self.assertEqual(split(parse_smaps(SMAPS), 524288), (81104, 80000))

    def test_a_second_mapping_of_the_guests_memory_is_the_guests(self):
        window = Mapping("rw-s", "00:01 199694", 64, 64)
        self.assertEqual(split([*parse_smaps(SMAPS), window], 524288), (81168, 80064))

    def test_anonymous_memory_is_the_guests_only_where_it_has_its_size(self):
        ram, heap = Mapping("rw-p", "00:00 0", 524288, 100), Mapping("rw-p", "00:00 0", 4096, 10)
        code = Mapping("rwxp", "00:00 0", 1048572, 1000)
        self.assertEqual(split([ram, heap, code], 524288), (1110, 100))


if __name__ == "__main__":
    unittest.main()
