// Package layout is the on-disk format of qcow2 images: header, header extensions, table entries,
// refcounts of all widths, the snapshot table, the bitmap directory and the arithmetic of sizes. It
// is pure: bytes in, values out; no I/O, no locks. Everything it parses may come from a hostile
// image, so nothing it allocates exceeds the bytes it was given.
//
// Source: qcow2.txt ("The QCOW2 image format"). Texts of errors are those of QEMU and reach the
// user as they are.
package layout
