package export_test

import "qblockd/graph/blk"

func vec(s string) blk.Vec { return blk.Buf([]byte(s)) }
