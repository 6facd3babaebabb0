package throttle

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"qblockd/schema/types"
)

// The limits of a group, in the order in which QEMU checks them.
const (
	bpsTotal = iota
	bpsRead
	bpsWrite
	iopsTotal
	iopsRead
	iopsWrite
	numBuckets
)

// bucketNames are the limits' names for users.
var bucketNames = [numBuckets]string{"bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"}

// maxValue is the largest rate.
const maxValue = 1000000000000000

// rate is one limit: units a second on average, at most max a second in bursts, which last at most
// length seconds. A max of 0: no bursts but of a tenth of a second's share.
type rate struct{ avg, max, length uint64 }

// Limits are what a group is to keep to. The numbers are kept as they were given; Check tells
// whether they make sense.
type Limits struct {
	rates [numBuckets]rate
	size  uint64 // bytes beyond which a request counts as several; 0: none does
}

// NoLimits are those of a new group.
func NoLimits() (l Limits) {
	for i := range l.rates {
		l.rates[i].length = 1
	}
	return l
}

// limited tells whether there is any limit.
func (l *Limits) limited() bool {
	for i := range l.rates {
		if l.rates[i].avg > 0 {
			return true
		}
	}
	return false
}

// fields are the members of o for each limit.
func fields(o *types.ThrottleLimits) [numBuckets][3]**int64 {
	return [numBuckets][3]**int64{
		{&o.BpsTotal, &o.BpsTotalMax, &o.BpsTotalMaxLength},
		{&o.BpsRead, &o.BpsReadMax, &o.BpsReadMaxLength},
		{&o.BpsWrite, &o.BpsWriteMax, &o.BpsWriteMaxLength},
		{&o.IopsTotal, &o.IopsTotalMax, &o.IopsTotalMaxLength},
		{&o.IopsRead, &o.IopsReadMax, &o.IopsReadMaxLength},
		{&o.IopsWrite, &o.IopsWriteMax, &o.IopsWriteMaxLength},
	}
}

// Apply takes over what o gives and checks the whole, as in QEMU: negative numbers are not
// looked for, they are too large. l is undefined after an error.
func (l *Limits) Apply(o *types.ThrottleLimits) error {
	for i, f := range fields(o) {
		r := &l.rates[i]
		give(&r.avg, *f[0])
		give(&r.max, *f[1])
		if n := *f[2]; n != nil {
			if *n > math.MaxUint32 {
				return fmt.Errorf("%s-max-length value must be in the range [0, %d]", bucketNames[i], uint32(math.MaxUint32))
			}
			r.length = uint64(*n)
		}
	}
	give(&l.size, o.IopsSize)
	return l.Check()
}

func give(to *uint64, from *int64) {
	if from != nil {
		*to = uint64(*from)
	}
}

// Shown are the limits as clients read them.
func (l *Limits) Shown() *types.ThrottleLimits {
	o := &types.ThrottleLimits{}
	for i, f := range fields(o) {
		r := l.rates[i]
		for k, v := range []uint64{r.avg, r.max, r.length} {
			n := int64(v)
			*f[k] = &n
		}
	}
	size := int64(l.size)
	o.IopsSize = &size
	return o
}

// sizeName is the one property that is no limit.
const sizeName = "iops-size"

// field finds the number that the property name, without "x-", stands for; nil if there is none.
func (l *Limits) field(name string) (v *uint64, length bool) {
	if name == sizeName {
		return &l.size, false
	}
	for i, b := range bucketNames {
		if rest, ok := strings.CutPrefix(name, b); ok {
			switch r := &l.rates[i]; rest {
			case "":
				return &r.avg, false
			case "-max":
				return &r.max, false
			case "-max-length":
				return &r.length, true
			}
		}
	}
	return nil, false
}

// Get reads a property by its name that begins with "x-".
func (l *Limits) Get(name string) (int64, bool) {
	if short, ok := strings.CutPrefix(name, "x-"); ok {
		if v, _ := l.field(short); v != nil {
			return int64(*v), true
		}
	}
	return 0, false
}

// set sets the property name, without "x-". The whole is not checked.
func (l *Limits) set(name string, n int64) error {
	v, length := l.field(name)
	switch {
	case v == nil:
		panic("throttle: no property " + name)
	case n < 0:
		return errors.New("Property values cannot be negative")
	case length && n > math.MaxUint32:
		return fmt.Errorf("x-%s value must be in therange [0, %d]", name, uint32(math.MaxUint32)) // QEMU's typing
	}
	*v = uint64(n)
	return nil
}

// FromOptions makes the limits of a new group.
func FromOptions(o *types.ThrottleGroupProperties) (Limits, error) {
	l := NoLimits()
	if o == nil {
		return l, nil
	}
	for _, x := range []struct {
		name string
		v    *int64
	}{
		{"iops-total", o.XIopsTotal}, {"iops-total-max", o.XIopsTotalMax}, {"iops-total-max-length", o.XIopsTotalMaxLength},
		{"iops-read", o.XIopsRead}, {"iops-read-max", o.XIopsReadMax}, {"iops-read-max-length", o.XIopsReadMaxLength},
		{"iops-write", o.XIopsWrite}, {"iops-write-max", o.XIopsWriteMax}, {"iops-write-max-length", o.XIopsWriteMaxLength},
		{"bps-total", o.XBpsTotal}, {"bps-total-max", o.XBpsTotalMax}, {"bps-total-max-length", o.XBpsTotalMaxLength},
		{"bps-read", o.XBpsRead}, {"bps-read-max", o.XBpsReadMax}, {"bps-read-max-length", o.XBpsReadMaxLength},
		{"bps-write", o.XBpsWrite}, {"bps-write-max", o.XBpsWriteMax}, {"bps-write-max-length", o.XBpsWriteMaxLength},
		{sizeName, o.XIopsSize},
	} {
		if x.v != nil {
			if err := l.set(x.name, *x.v); err != nil {
				return l, err
			}
		}
	}
	if o.Limits != nil {
		return l, l.Apply(o.Limits)
	}
	return l, l.Check()
}

// Check says what is wrong with the limits, in QEMU's words and order.
func (l *Limits) Check() error {
	r := &l.rates
	for _, total := range []int{bpsTotal, iopsTotal} { // those of reads and writes follow
		t, read, write := r[total], r[total+1], r[total+2]
		if t.avg != 0 && read.avg|write.avg != 0 || t.max != 0 && read.max|write.max != 0 {
			return errors.New("bps/iops/max total values and read/write values cannot be used at the same time")
		}
	}
	if l.size != 0 && r[iopsTotal].avg == 0 && r[iopsRead].avg == 0 && r[iopsWrite].avg == 0 {
		return errors.New("iops size requires an iops value to be set")
	}
	for i := range r {
		if err := r[i].check(); err != nil {
			return err
		}
	}
	return nil
}

func (r *rate) check() error {
	switch {
	case r.avg > maxValue || r.max > maxValue:
		return fmt.Errorf("bps/iops/max values must be within [0, %d]", int64(maxValue))
	case r.length == 0:
		return errors.New("the burst length cannot be 0")
	case r.length > 1 && r.max == 0:
		return errors.New("burst length set without burst rate")
	case r.max != 0 && r.length > maxValue/r.max:
		return errors.New("burst length too high for this burst rate")
	case r.max != 0 && r.avg == 0:
		return errors.New("bps_max/iops_max require corresponding bps/iops values")
	case r.max != 0 && r.max < r.avg:
		return errors.New("bps_max/iops_max cannot be lower than bps/iops")
	}
	return nil
}
