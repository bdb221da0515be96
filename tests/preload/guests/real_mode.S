# A program for the BIOS on a floppy disk, of the kind that DOS was: everything by software interrupts, in 16-bit
# code with segments. The boot sector loads the rest. Prints what it does, and at the end "real mode: done with KEY"
# or "real mode: WRONG" and a letter that names the step.
    .code16
    .globl _start

.macro require step, condition
    movb $\step, step
    \condition good\@
    jmp wrong
good\@:
.endm

_start:
    ljmp $0, $begin
begin:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    cld
    movb %dl, drive
    movw $0x0003, %ax           # 80 x 25, clears the screen
    int $0x10
    # INT 13h, AH=2: the sectors behind this one
    movw $0x0200 + rest_sectors, %ax
    movw $0x7e00, %bx
    movw $0x0002, %cx
    movb $0, %dh
    int $0x13
    jc wrong
    jmp rest

print:                          # DS:SI
    lodsb
    testb %al, %al
    jz 1f
    movb $0x0e, %ah
    movw $7, %bx
    int $0x10
    jmp print
1:  ret

wrong:
    xorw %ax, %ax
    movw %ax, %ds
    movw $text_wrong, %si
    call print
    movb step, %al
    movb $0x0e, %ah
    int $0x10
1:  hlt
    jmp 1b

drive: .byte 0
step:  .byte 'A'
text_wrong: .asciz "\r\nreal mode: WRONG at step "
    .org 510
    .word 0xaa55

rest:
    call divide_error
    call decimal
    call strings
    call self_modifying
    call far_calls
    call unreal
    call disk
    call timer
    call video
    movw $text_key, %si
    call print
    xorb %ah, %ah               # INT 16h, AH=0: waits for a key
    int $0x16
    movb %al, key
    movw $text_done, %si
    call print
1:  hlt
    jmp 1b

# A #DE's handler goes on behind the division: it is a fault.
divide_error:
    movl 0, %eax
    pushl %eax
    movw $divide_handler, 0
    movw $0, 2
    movw $0x1234, %ax
    xorw %dx, %dx
    xorb %cl, %cl
    divb %cl
    popl %eax
    movl %eax, 0
    cmpw $0x5678, %dx
    require 'B', je
    ret
divide_handler:
    pushw %bp
    movw %sp, %bp
    addw $2, 2(%bp)
    popw %bp
    movw $0x5678, %dx
    iret

decimal:
    movb $0x58, %al
    addb $0x67, %al
    daa
    require 'C', jc
    cmpb $0x25, %al
    require 'D', je
    movw $0x0009, %ax
    addb $8, %al
    aaa
    cmpw $0x0107, %ax
    require 'E', je
    movb $73, %al
    aam
    cmpw $0x0703, %ax
    require 'F', je
    aad
    cmpw $73, %ax
    require 'G', je
    ret

# A string instruction wraps within its segment.
strings:
    pushw %es
    movw $0x2000, %ax
    movw %ax, %es
    movw $0xfffe, %di
    movb $0x5a, %al
    movw $4, %cx
    rep stosb
    cmpw $2, %di
    require 'Q', je
    cmpw $0x5a5a, %es:0xfffe
    require 'R', je
    cmpw $0x5a5a, %es:0
    require 'S', je
    popw %es
    ret

self_modifying:
    movw $300, %cx
    xorw %dx, %dx
1:  movw %cx, patched + 1
patched:
    movw $0, %ax
    addw %ax, %dx
    loop 1b
    cmpw $45150, %dx
    require 'H', je
    ret

far_calls:
    movw $0x1000, %ax
    movw %ax, %es
    movw $far_code, %si
    xorw %di, %di
    movw $far_end - far_code, %cx
    rep movsb
    movw $1, %ax
    lcall $0x1000, $0
    cmpw $8, %ax
    require 'I', je
    lcall *far_pointer
    cmpw $15, %ax
    require 'J', je
    xorw %ax, %ax
    movw %ax, %es
    ret
far_pointer: .word 0, 0x1000
far_code:
    addw $7, %ax
    lret
far_end:

# DS with 4 GiB by a visit to protected mode, and memory above 1 MiB through the open A20 gate.
unreal:
    movw $0x2401, %ax           # INT 15h: opens A20
    int $0x15
    require 'K', jnc
    cli
    lgdt table
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    jmp 1f
1:  movw $8, %bx
    movw %bx, %ds
    andb $0xfe, %al
    movl %eax, %cr0
    ljmp $0, $2f
2:  movl $0x200000, %ebx
    movl $0xcafebabe, %ds:(%ebx)
    movl %ds:(%ebx), %ecx
    xorw %ax, %ax
    movw %ax, %ds
    sti
    cmpl $0xcafebabe, %ecx
    require 'L', je
    ret
    .balign 8
descriptors:
    .quad 0, 0x00cf92000000ffff
table:
    .word 15
    .long descriptors

# INT 13h: writes a sector by DMA, reads it back elsewhere.
disk:
    movw $0x9000, %di
    movw $256, %cx
    movw $0x1357, %ax
1:  stosw
    addw $0x2468, %ax
    loop 1b
    movw $0x0301, %ax
    movw $0x9000, %bx
    call transfer
    require 'M', jnc
    movw $0x0201, %ax
    movw $0x9400, %bx
    call transfer
    require 'N', jnc
    movw $0x9000, %si
    movw $0x9400, %di
    movw $256, %cx
    repe cmpsw
    require 'O', je
    ret
transfer:
    movw $0x4f12, %cx           # cylinder 79, sector 18
    movb $1, %dh
    movb drive, %dl
    int $0x13
    ret

# Five ticks of the BIOS's timer come through a handler of ours.
timer:
    cli
    movl 0x1c * 4, %eax
    movl %eax, old_timer
    movw $tick, 0x1c * 4
    movw $0, 0x1c * 4 + 2
    sti
1:  hlt
    cmpw $5, ticks
    jb 1b
    cli
    movl old_timer, %eax
    movl %eax, 0x1c * 4
    sti
    ret
tick:
    incw %cs:ticks
    ljmp *%cs:old_timer
ticks: .word 0
old_timer: .long 0

# What is written to video memory is what the BIOS reads there.
video:
    movw $0xb800, %ax
    movw %ax, %es
    movw $0x1e21, %es:0
    xorw %ax, %ax
    movw %ax, %es
    movb $2, %ah
    xorw %bx, %bx
    xorw %dx, %dx
    int $0x10                   # cursor to 0, 0
    movb $8, %ah
    int $0x10
    cmpw $0x1e21, %ax
    require 'P', je
    movb $2, %ah
    movw $0x0200, %dx
    int $0x10
    ret

text_key:  .asciz "press a key\r\n"
text_done: .ascii "real mode: done with "
key:       .byte 0, 13, 10, 0
    .balign 512
    .set rest_sectors, (. - _start) / 512 - 1
