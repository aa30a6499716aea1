# The guest that is migrated: a boot sector that writes its own disk, and an operating system is
# not needed for that.
#
# Round by round it writes one sector, reads two of earlier rounds back (the one written just
# before, and the oldest that no later round has overwritten) and prints the round's number on
# the debug port: eight digits and a newline. A sector that is not as it was written ends it with
# a line "M" and the number of that round, a BIOS error with "E", the BIOS's status and the
# round.
#
# Round n writes sector FIRST + STEP * (n * STRIDE mod SPAN), all of it (n, sector) in 32 bits
# each, over and over. SPAN is a prime, so SPAN rounds write SPAN different sectors. The four are
# given when this is assembled (vm.py).

        .intel_syntax noprefix
        .code16
        .set    PORT, 0xe9
        .set    SECTOR, 512
        .set    pattern, 0x8000         # what a sector has to hold
        .set    found, pattern + SECTOR # what was read

        .globl  _start
_start: xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        cld
        mov     [drive], dl

next:   inc     dword ptr [round]
        mov     ecx, [round]
        call    make_pattern
        mov     ah, 0x43                # extended write
        mov     word ptr [address], pattern
        call    disk
        mov     ecx, [round]
        dec     ecx
        call    check
        mov     ecx, [round]
        sub     ecx, SPAN - 1
        call    check
        mov     ecx, [round]
        call    print
        jmp     next

# Reads round ecx's sector back; there is none where ecx is not above zero.
check:  cmp     ecx, 0
        jle     1f
        call    make_pattern
        mov     ah, 0x42                # extended read
        mov     word ptr [address], found
        call    disk
        mov     si, offset pattern
        mov     di, offset found
        push    ecx
        mov     ecx, SECTOR / 4
        repe    cmpsd
        pop     ecx
        jne     2f
1:      ret
2:      mov     al, 'M'
        jmp     stop

# Makes what round ecx writes, and sets the packet's sector.
make_pattern:
        mov     eax, ecx
        mov     ebx, STRIDE
        mul     ebx
        mov     ebx, SPAN
        div     ebx
        imul    edx, edx, STEP
        add     edx, FIRST
        mov     [sector], edx
        mov     di, offset pattern
        mov     bx, SECTOR / 8
1:      mov     eax, ecx
        stosd
        mov     eax, edx
        stosd
        dec     bx
        jnz     1b
        ret

# One BIOS call, ah, for the packet; ecx is kept.
disk:   push    ecx
        mov     al, 0
        mov     dl, [drive]
        mov     si, offset packet
        int     0x13
        pop     ecx
        jc      1f
        ret
1:      mov     bl, ah
        mov     al, 'E'
        out     PORT, al
        mov     al, bl
        add     al, ' '

# Prints al, then ecx, and stays here.
stop:   out     PORT, al
        call    print
1:      hlt
        jmp     1b

# Prints ecx.
print:  mov     bx, 8
1:      rol     ecx, 4
        mov     al, cl
        and     al, 15
        add     al, '0'
        cmp     al, '9'
        jbe     2f
        add     al, 'a' - '0' - 10
2:      out     PORT, al
        dec     bx
        jnz     1b
        mov     al, '\n'
        out     PORT, al
        ret

drive:  .byte   0
        .balign 4
round:  .long   0
packet: .byte   16, 0
        .word   1                       # sectors
address:
        .word   0, 0
sector: .long   0, 0

        .org    510
        .word   0xaa55
