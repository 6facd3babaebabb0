package blk

// DebugEvent is a step that a driver, or the generic layer, is about to take: what a rule of
// blkdebug can wait for. The names are those of BlkdebugEvent in the schema.
type DebugEvent uint8

// The events, in the order of the schema.
const (
	EvL1Update DebugEvent = iota
	EvL1GrowAllocTable
	EvL1GrowWriteTable
	EvL1GrowActivateTable
	EvL2Load
	EvL2Update
	EvL2UpdateCompressed
	EvL2AllocCowRead
	EvL2AllocWrite
	EvReadAio
	EvReadBackingAio
	EvReadCompressed
	EvWriteAio
	EvWriteCompressed
	EvVmstateLoad
	EvVmstateSave
	EvCowRead
	EvCowWrite
	EvReftableLoad
	EvReftableGrow
	EvReftableUpdate
	EvRefblockLoad
	EvRefblockUpdate
	EvRefblockUpdatePart
	EvRefblockAlloc
	EvRefblockAllocHookup
	EvRefblockAllocWrite
	EvRefblockAllocWriteBlocks
	EvRefblockAllocWriteTable
	EvRefblockAllocSwitchTable
	EvClusterAlloc
	EvClusterAllocBytes
	EvClusterFree
	EvFlushToOS
	EvFlushToDisk
	EvPwritevRmwHead
	EvPwritevRmwAfterHead
	EvPwritevRmwTail
	EvPwritevRmwAfterTail
	EvPwritev
	EvPwritevZero
	EvPwritevDone
	EvEmptyImagePrepare
	EvL1ShrinkWriteTable
	EvL1ShrinkFreeL2Clusters
	EvCorWrite
	EvClusterAllocSpace
	EvNone
	NumDebugEvents = iota
)
