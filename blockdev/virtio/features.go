package virtio

// Feature bits of every device, as masks.
const (
	FIndirect uint64 = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FEventIdx uint64 = 1 << 29 // VIRTIO_F_EVENT_IDX
	FVersion1 uint64 = 1 << 32 // VIRTIO_F_VERSION_1
	FPacked   uint64 = 1 << 34 // VIRTIO_F_RING_PACKED
)

// Feature bits of block devices, as masks.
const (
	BlkFSizeMax     uint64 = 1 << 1  // VIRTIO_BLK_F_SIZE_MAX: BlkConfig.SizeMax holds
	BlkFSegMax      uint64 = 1 << 2  // VIRTIO_BLK_F_SEG_MAX: BlkConfig.SegMax holds
	BlkFReadOnly    uint64 = 1 << 5  // VIRTIO_BLK_F_RO
	BlkFBlockSize   uint64 = 1 << 6  // VIRTIO_BLK_F_BLK_SIZE: BlkConfig.BlockSize holds
	BlkFFlush       uint64 = 1 << 9  // VIRTIO_BLK_F_FLUSH: there is a volatile cache
	BlkFTopology    uint64 = 1 << 10 // VIRTIO_BLK_F_TOPOLOGY
	BlkFConfigWCE   uint64 = 1 << 11 // VIRTIO_BLK_F_CONFIG_WCE: the driver may switch the cache
	BlkFMultiQueue  uint64 = 1 << 12 // VIRTIO_BLK_F_MQ: BlkConfig.Queues holds
	BlkFDiscard     uint64 = 1 << 13 // VIRTIO_BLK_F_DISCARD
	BlkFWriteZeroes uint64 = 1 << 14 // VIRTIO_BLK_F_WRITE_ZEROES
)

// MaxQueueSize is the largest number of descriptors of a queue.
const MaxQueueSize = 1 << 15
