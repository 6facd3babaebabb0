#include "textflag.h"

// AES with the instructions of the processor, in their three-operand forms: operands in memory need
// no alignment. Round keys are 16 bytes each, one after the other.
//
// In all functions: AX round keys, BX rounds, SI source, DI destination; X0 to X7 blocks, X8 the
// mask of the next block (XTS), X9 what multiplying by x feeds back, X10 scratch, X11 a round key.

// feedback: the bit that leaves a half of the mask comes in at the upper half, or as x^7+x^2+x+1 at
// the lower one.
DATA feedback<>+0(SB)/8, $0x87
DATA feedback<>+8(SB)/8, $1
GLOBL feedback<>(SB), RODATA|NOPTR, $16

// NEXT multiplies the mask by x.
#define NEXT \
	VPSHUFD $0x13, X8, X10; \
	VPSRAD  $31, X10, X10; \
	VPAND   X9, X10, X10; \
	VPADDQ  X8, X8, X8; \
	VPXOR   X10, X8, X8

// MASKED loads a block, masked, and keeps the mask on the stack.
#define MASKED(off, x) \
	VMOVDQU X8, off(SP); \
	VPXOR   off(SI), X8, x; \
	NEXT

// UNMASKED masks a block again and stores it.
#define UNMASKED(off, x) \
	VPXOR   off(SP), x, x; \
	VMOVDQU x, off(DI)

#define ALL(op) \
	op X11, X0, X0; \
	op X11, X1, X1; \
	op X11, X2, X2; \
	op X11, X3, X3; \
	op X11, X4, X4; \
	op X11, X5, X5; \
	op X11, X6, X6; \
	op X11, X7, X7

// ROUNDS does all rounds of 8 blocks. R9 and R10 are scratch.
#define ROUNDS(op, last, label) \
	VMOVDQU (AX), X11; \
	ALL(VPXOR); \
	LEAQ 16(AX), R9; \
	LEAQ -1(BX), R10; \
label: \
	VMOVDQU (R9), X11; \
	ADDQ $16, R9; \
	ALL(op); \
	DECQ R10; \
	JNZ label; \
	VMOVDQU (R9), X11; \
	ALL(last)

// XTS works on DX sectors of 512 bytes, whose masks CX points to. R8 counts 8 blocks at a time.
#define XTS(op, last) \
	MOVQ k+0(FP), AX; \
	MOVQ rounds+8(FP), BX; \
	MOVQ tweaks+16(FP), CX; \
	MOVQ dst+24(FP), DI; \
	MOVQ src+32(FP), SI; \
	MOVQ sectors+40(FP), DX; \
	VMOVDQU feedback<>(SB), X9; \
sector: \
	VMOVDQU (CX), X8; \
	ADDQ $16, CX; \
	MOVQ $4, R8; \
eight: \
	MASKED(0, X0); \
	MASKED(16, X1); \
	MASKED(32, X2); \
	MASKED(48, X3); \
	MASKED(64, X4); \
	MASKED(80, X5); \
	MASKED(96, X6); \
	MASKED(112, X7); \
	ROUNDS(op, last, round); \
	UNMASKED(0, X0); \
	UNMASKED(16, X1); \
	UNMASKED(32, X2); \
	UNMASKED(48, X3); \
	UNMASKED(64, X4); \
	UNMASKED(80, X5); \
	UNMASKED(96, X6); \
	UNMASKED(112, X7); \
	ADDQ $128, SI; \
	ADDQ $128, DI; \
	DECQ R8; \
	JNZ eight; \
	DECQ DX; \
	JNZ sector

// ONE does one block.
#define ONE(op, last) \
	MOVQ k+0(FP), AX; \
	MOVQ rounds+8(FP), BX; \
	MOVQ dst+16(FP), DI; \
	MOVQ src+24(FP), SI; \
	VMOVDQU (SI), X0; \
	VPXOR (AX), X0, X0; \
	DECQ BX; \
round: \
	ADDQ $16, AX; \
	op (AX), X0, X0; \
	DECQ BX; \
	JNZ round; \
	last 16(AX), X0, X0; \
	VMOVDQU X0, (DI)

// func aesXTSEncrypt(k *[15][16]byte, rounds int, tweaks *[16]byte, dst, src *byte, sectors int)
TEXT ·aesXTSEncrypt(SB), NOSPLIT, $128-48
	XTS(VAESENC, VAESENCLAST)
	RET

// func aesXTSDecrypt(k *[15][16]byte, rounds int, tweaks *[16]byte, dst, src *byte, sectors int)
TEXT ·aesXTSDecrypt(SB), NOSPLIT, $128-48
	XTS(VAESDEC, VAESDECLAST)
	RET

// func aesEncrypt8(k *[15][16]byte, rounds int, b *[8][16]byte)
TEXT ·aesEncrypt8(SB), NOSPLIT, $0-24
	MOVQ k+0(FP), AX
	MOVQ rounds+8(FP), BX
	MOVQ b+16(FP), DI
	VMOVDQU 0(DI), X0
	VMOVDQU 16(DI), X1
	VMOVDQU 32(DI), X2
	VMOVDQU 48(DI), X3
	VMOVDQU 64(DI), X4
	VMOVDQU 80(DI), X5
	VMOVDQU 96(DI), X6
	VMOVDQU 112(DI), X7
	ROUNDS(VAESENC, VAESENCLAST, round)
	VMOVDQU X0, 0(DI)
	VMOVDQU X1, 16(DI)
	VMOVDQU X2, 32(DI)
	VMOVDQU X3, 48(DI)
	VMOVDQU X4, 64(DI)
	VMOVDQU X5, 80(DI)
	VMOVDQU X6, 96(DI)
	VMOVDQU X7, 112(DI)
	RET

// func aesEncrypt(k *[15][16]byte, rounds int, dst, src *byte)
TEXT ·aesEncrypt(SB), NOSPLIT, $0-32
	ONE(VAESENC, VAESENCLAST)
	RET

// func aesDecrypt(k *[15][16]byte, rounds int, dst, src *byte)
TEXT ·aesDecrypt(SB), NOSPLIT, $0-32
	ONE(VAESDEC, VAESDECLAST)
	RET

// func aesSubWord(w uint32) uint32
//
// The last round of AES with all columns alike and a key of zeroes is the S-box alone: moving bytes
// between columns changes nothing.
TEXT ·aesSubWord(SB), NOSPLIT, $0-12
	MOVL w+0(FP), AX
	VMOVD AX, X0
	VPSHUFD $0, X0, X0
	VPXOR X1, X1, X1
	VAESENCLAST X1, X0, X0
	VMOVD X0, AX
	MOVL AX, ret+8(FP)
	RET

// func aesInvMix(dst, src *[16]byte)
TEXT ·aesInvMix(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	VMOVDQU (SI), X0
	VAESIMC X0, X0
	VMOVDQU X0, (DI)
	RET
