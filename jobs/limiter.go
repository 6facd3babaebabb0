package jobs

import "time"

// slice is the period over which a speed limit is kept.
const slice = 100 * time.Millisecond

// limiter lets a quota of bytes pass in each slice of time; what exceeds it is paid for by
// waiting for the following slices. The zero value has no limit.
type limiter struct {
	quota      int64 // bytes a slice; 0: no limit
	start, end time.Time
	passed     int64 // since start
}

func (l *limiter) setSpeed(bps int64) {
	l.quota = 0
	if bps > 0 {
		l.quota = max(bps/int64(time.Second/slice), 1)
	}
	// The next take begins a new slice, so that the new speed counts at once.
	l.end = time.Time{}
}

// take counts n bytes and returns how long to wait before more may pass.
func (l *limiter) take(now time.Time, n int64) time.Duration {
	if l.quota == 0 {
		return 0
	}
	if !now.Before(l.end) {
		l.start, l.end, l.passed = now, now.Add(slice), 0
	}
	l.passed += n
	if l.passed < l.quota {
		return 0
	}
	slices := float64(l.passed) / float64(l.quota)
	l.end = l.start.Add(time.Duration(slices * float64(slice)))
	return l.end.Sub(now)
}
