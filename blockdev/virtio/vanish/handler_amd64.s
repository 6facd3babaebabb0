//go:build linux

#include "textflag.h"

// handler is called by the kernel for SIGBUS: DI the signal, SI its siginfo_t, DX the context, on
// the thread's stack for signals. All registers are restored when it returns. If the address of the
// fault is in an area it puts a page of zeroes there, and the access is repeated; else, or if that
// fails, it goes on with what was the handler before.
TEXT ·handler(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVQ 16(SI), AX // si_addr
	MOVQ ·count(SB), CX
	LEAQ ·entries(SB), BX

look:
	TESTQ CX, CX
	JZ    pass
	MOVQ  8(BX), R8 // end
	CMPQ  AX, R8
	JCC   other
	CMPQ  AX, 0(BX) // start
	JCC   found

other:
	ADDQ $32, BX
	DECQ CX
	JMP  look

found:
	MOVQ  $1, 24(BX) // gone
	LOCK
	INCQ  ·faults(SB)
	MOVQ  DI, R12
	MOVQ  SI, R13
	MOVQ  DX, R15
	MOVQ  16(BX), SI // length: a page
	MOVQ  SI, DI
	NEGQ  DI
	ANDQ  AX, DI // address: where it begins
	MOVL  $3, DX // PROT_READ|PROT_WRITE
	MOVL  $0x32, R10 // MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS
	MOVQ  $-1, R8
	XORL  R9, R9
	MOVL  $9, AX // mmap
	SYSCALL
	CMPQ  AX, $-4096
	JHI   failed
	RET

failed:
	MOVQ R12, DI
	MOVQ R13, SI
	MOVQ R15, DX

pass:
	MOVQ ·next(SB), AX
	JMP  AX

// func handlerPC() uintptr
TEXT ·handlerPC(SB), NOSPLIT, $0-8
	LEAQ ·handler(SB), AX
	MOVQ AX, ret+0(FP)
	RET
