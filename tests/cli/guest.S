// A multiboot 1 kernel of a few hundred bytes for the tests of the command. The first letter of its command line (after
// the kernel's name, which multiboot puts first: the loader's choice, so the last word is looked at) says what it does:
//   o  print "hello" and power off       r  print "reset?" and reset through port 0xcf9
//   t  triple fault                      d  write 5 to isa-debug-exit at 0xf4
//   e  echo serial input; 'q' powers off h  print "halted" and halt for ever
//   s  print for ever                    p  tell pvpanic that the kernel has panicked
// Integer instructions only, so that it runs on every accelerator.

        .set MAGIC, 0x1badb002
        .set SERIAL, 0x3f8
        .set PM1_CONTROL, 0x604
        .set S5, (5 << 10) | (1 << 13)

        .code32
        .section .text
        .globl _start
        .align 4
        .long MAGIC, 0, -MAGIC
_start:
        mov $stack_top, %esp
        mov 16(%ebx), %esi              // command line
        xor %ecx, %ecx                  // the last character that is not a blank
1:      lodsb
        test %al, %al
        jz 2f
        cmp $' ', %al
        je 1b
        mov %eax, %ecx
        jmp 1b
2:      cmp $'o', %cl
        je power_off_hello
        cmp $'r', %cl
        je reset
        cmp $'t', %cl
        je triple
        cmp $'d', %cl
        je debug_exit
        cmp $'p', %cl
        je panicked
        cmp $'e', %cl
        je echo
        cmp $'s', %cl
        je spam
        mov $halted, %esi
        call print
3:      cli
        hlt
        jmp 3b

power_off_hello:
        mov $hello, %esi
        call print
power_off:
        mov $PM1_CONTROL, %edx
        mov $S5, %eax
        out %ax, %dx
        jmp .

reset:  mov $resetting, %esi
        call print
        mov $0xcf9, %edx
        mov $2, %al
        out %al, %dx
        mov $6, %al
        out %al, %dx
        jmp .

triple: lidt no_idt
        ud2

debug_exit:
        mov $5, %eax
        out %eax, $0xf4
        jmp .

panicked:
        mov $0x505, %edx
        in (%dx), %al
        out %al, (%dx)
        jmp .

spam:   mov $hello, %esi
        call print
        jmp spam

echo:   mov $ready, %esi
        call print
1:      mov $SERIAL + 5, %edx           // LSR
2:      in %dx, %al
        test $1, %al
        jz 2b
        mov $SERIAL, %edx
        in %dx, %al
        cmp $'q', %al
        je power_off
        call put
        jmp 1b

// Prints the zero-terminated string at ESI.
print:  lodsb
        test %al, %al
        jz 1f
        call put
        jmp print
1:      ret

// Writes AL once the transmitter is free.
put:    mov %al, %ah
        mov $SERIAL + 5, %edx
1:      in %dx, %al
        test $0x20, %al
        jz 1b
        mov $SERIAL, %edx
        mov %ah, %al
        out %al, %dx
        ret

hello:     .asciz "hello\n"
resetting: .asciz "reset?\n"
halted:    .asciz "halted\n"
ready:     .asciz "ready\n"
        .align 8
no_idt: .word 0
        .long 0
        .bss
        .skip 4096
stack_top:
