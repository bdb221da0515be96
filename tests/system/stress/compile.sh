#!/bin/sh
# Compiles workload.c with the compiler, assembler and linker of the tree $1 in directory $2, at several levels of
# optimization, runs each program and prints the SHA-256 of all that came out. The same on any x86-64 processor that
# works: the system test compares a guest's lines with the host's.
set -e
root=$1
work=$2
here=$(dirname "$0")
gcc=$root/usr/lib/gcc/x86_64-linux-gnu/12
libraries=$root/usr/lib/x86_64-linux-gnu

# By the tree's own loader, so that the host's libraries take no part.
tool() { "$root/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$root/lib/x86_64-linux-gnu:$libraries" "$@"; }

cp "$here/workload.c" "$work/"
cd "$work"
for level in 0 1 2 3 s; do
  tool "$gcc/cc1" -quiet -nostdinc -isystem "$gcc/include" -isystem "$root/usr/include" \
    -isystem "$root/usr/include/x86_64-linux-gnu" -O$level workload.c -o workload$level.s
  tool "$root/usr/bin/x86_64-linux-gnu-as" --64 workload$level.s -o workload$level.o
  tool "$root/usr/bin/x86_64-linux-gnu-ld.bfd" -m elf_x86_64 -static -o workload$level "$libraries/crt1.o" \
    "$libraries/crti.o" "$gcc/crtbeginT.o" workload$level.o --start-group "$libraries/libc.a" "$libraries/libm-2.36.a" \
    "$libraries/libmvec.a" "$gcc/libgcc.a" "$gcc/libgcc_eh.a" --end-group "$gcc/crtend.o" "$libraries/crtn.o"
  ./workload$level >workload$level.out
  for file in workload$level.s workload$level.o workload$level workload$level.out; do
    echo "compile: $(sha256sum "$file")"
  done
done
