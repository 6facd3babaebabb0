package graph

import "iter"

// list is a doubly linked list. Who can be on it has an item in itself for that, so that going on
// and off takes no memory and no search.
type list[T any] struct{ first, last *item[T] }

type item[T any] struct {
	of         *T
	prev, next *item[T]
}

// insert puts x, the item of v, before at; nil: at the end.
func (l *list[T]) insert(x *item[T], v *T, at *item[T]) {
	x.of, x.next = v, at
	if at != nil {
		x.prev, at.prev = at.prev, x
	} else {
		x.prev, l.last = l.last, x
	}
	if x.prev != nil {
		x.prev.next = x
	} else {
		l.first = x
	}
}

func (l *list[T]) remove(x *item[T]) {
	if x.prev != nil {
		x.prev.next = x.next
	} else {
		l.first = x.next
	}
	if x.next != nil {
		x.next.prev = x.prev
	} else {
		l.last = x.prev
	}
	x.prev, x.next = nil, nil
}

func (l *list[T]) empty() bool { return l.first == nil }

// all are those on the list, in order.
func (l *list[T]) all() iter.Seq[*T] {
	return func(yield func(*T) bool) {
		for x := l.first; x != nil; x = x.next {
			if !yield(x.of) {
				return
			}
		}
	}
}
