package throttle

import (
	"math"
	"time"
)

// direction of a request.
type direction int

const (
	reading direction = iota
	writing
)

// buckets are the state of the limits: a bucket for each, which requests fill and time empties. A
// request may pass when none of the buckets that concern it is fuller than its limit allows; then
// it fills them, however large it is. So what is too large is paid for by those that come later.
type buckets struct {
	limits Limits
	fill   [numBuckets]struct {
		level float64 // units above what the average has let through
		burst float64 // units above what the rate of bursts has let through; only for bursts longer than a second
	}
	last time.Duration // when time was last taken into account
}

// concern lists the buckets that requests of a direction fill.
var concern = [2][4]int{
	reading: {bpsTotal, iopsTotal, bpsRead, iopsRead},
	writing: {bpsTotal, iopsTotal, bpsWrite, iopsWrite},
}

// leak takes the time until now into account.
func (b *buckets) leak(now time.Duration) {
	d := (now - b.last).Seconds()
	b.last = now
	if d <= 0 {
		return
	}
	for i := range b.fill {
		f, r := &b.fill[i], &b.limits.rates[i]
		f.level = max(f.level-float64(r.avg)*d, 0)
		if r.length > 1 {
			f.burst = max(f.burst-float64(r.max)*d, 0)
		}
	}
}

// wait is how long the next request of a direction has to wait from the last leak on; 0: not at
// all.
func (b *buckets) wait(dir direction) time.Duration {
	var most time.Duration
	for _, i := range concern[dir] {
		most = max(most, b.waitFor(i))
	}
	return most
}

func (b *buckets) waitFor(i int) time.Duration {
	f, r := &b.fill[i], &b.limits.rates[i]
	if r.avg == 0 {
		return 0
	}
	room := float64(r.avg) / 10
	if r.max > 0 {
		room = float64(r.max) * float64(r.length)
	}
	if over := f.level - room; over > 0 {
		return seconds(over / float64(r.avg))
	}
	if r.length > 1 {
		if over := f.burst - float64(r.max)/10; over > 0 {
			return seconds(over / float64(r.max))
		}
	}
	return 0
}

// seconds is s as a duration, rounded down, at most some decades.
func seconds(s float64) time.Duration {
	const most = float64(math.MaxInt64 / 4)
	return time.Duration(min(s*float64(time.Second), most))
}

// add counts a request of n bytes; times is 1, or -1 for one that did not take place after all.
func (b *buckets) add(dir direction, n int64, times float64) {
	requests := times
	if b.limits.size > 0 && uint64(n) > b.limits.size {
		requests *= float64(n) / float64(b.limits.size)
	}
	for _, i := range concern[dir] {
		f, k := &b.fill[i], requests
		if i < iopsTotal {
			k = float64(n) * times
		}
		f.level = max(f.level+k, 0)
		if b.limits.rates[i].length > 1 {
			f.burst = max(f.burst+k, 0)
		}
	}
}
