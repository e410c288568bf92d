/*
counter_guest.S - a boot sector whose memory shows whether a migration lost a write

It walks COUNT pages from BASE on and adds one to the first 32-bit word of each, then adds one to PASS, for ever. So at
any moment pages 0 ... k-1 hold PASS + 1 and the others PASS: what counter_check.pl looks for in an image of the RAM.
Every 64th value of PASS goes to the serial port, as eight hexadecimal digits and a line feed. Needs 32 MiB of RAM.

    gcc -m32 -c counter_guest.S -o guest.o && ld -m elf_i386 -Ttext=0x7c00 --oformat=binary guest.o -o guest.img
*/
        .set    BASE, 0x1000000
        .set    COUNT, 4096
        .set    PASS, BASE - 4096
        .set    MAGIC, 0x474d4952               /* in the word after PASS: the guest runs */
        .set    COM1, 0x3f8

        .code16
        .globl  _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al                      /* address line 20 on, without a reset (bit 0) */
        orb     $2, %al
        andb    $0xfe, %al
        outb    %al, $0x92
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        movl    $16, %eax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7c00, %esp
        movl    $BASE, %edi
        xorl    %eax, %eax
        movl    %eax, PASS
        movl    $COUNT, %ecx
clear:  movl    %eax, (%edi)
        addl    $4096, %edi
        loop    clear
        movl    $MAGIC, PASS + 4

pass:   movl    $BASE, %edi
        movl    $COUNT, %ecx
walk:   incl    (%edi)
        addl    $4096, %edi
        loop    walk
        incl    PASS
        testl   $63, PASS
        jnz     pass
        call    print
        jmp     pass

/* PASS, on the serial port. */
print:  movl    PASS, %ebx
        movl    $8, %ecx
digit:  roll    $4, %ebx
        movl    %ebx, %eax
        andl    $15, %eax
        cmpl    $10, %eax
        jb      0f
        addl    $('a' - '0' - 10), %eax
0:      addl    $'0', %eax
        call    put
        loop    digit
        movl    $10, %eax
put:    movl    %eax, %esi
        movl    $(COM1 + 5), %edx
1:      inb     %dx, %al
        testb   $0x20, %al                      /* room for a byte */
        jz      1b
        movl    %esi, %eax
        movl    $COM1, %edx
        outb    %al, %dx
        ret

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff              /* code: all of memory */
        .quad   0x00cf92000000ffff              /* data: all of memory */
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55
        .org    0x100000                        /* seabios does not boot a disk of less than a cylinder */
        .section .note.GNU-stack, "", @progbits
