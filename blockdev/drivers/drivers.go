// Package drivers is the list of all drivers.
package drivers

import (
	"qblockd/blockdev/driver"
	"qblockd/blockdev/filter/blkdebug"
	"qblockd/blockdev/filter/blklogwrites"
	"qblockd/blockdev/filter/blkverify"
	"qblockd/blockdev/filter/compress"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/blockdev/filter/copyonread"
	"qblockd/blockdev/filter/preallocate"
	"qblockd/blockdev/filter/quorum"
	"qblockd/blockdev/filter/snapshotaccess"
	"qblockd/blockdev/filter/throttle"
	"qblockd/blockdev/format/luks"
	"qblockd/blockdev/format/qcow2"
	"qblockd/blockdev/format/raw"
	"qblockd/blockdev/protocol/file"
	"qblockd/blockdev/protocol/nbd"
	"qblockd/blockdev/protocol/null"
)

// All is what is compiled in.
var All = []*driver.Any{
	blkdebug.Def,
	blklogwrites.Def,
	blkverify.Def,
	compress.Def,
	copybeforewrite.Def,
	copyonread.Def,
	file.Def,
	file.HostDevice,
	file.HostCdrom,
	luks.Def,
	nbd.Def,
	null.Aio,
	null.Co,
	preallocate.Def,
	qcow2.Def,
	quorum.Def,
	raw.Def,
	snapshotaccess.Def,
	throttle.Def,
}
