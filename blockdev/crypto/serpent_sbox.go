package crypto

// The S-boxes of Serpent as boolean functions of 32 inputs at once, and their inverses. These
// functions, with few operations each, were published by Brian Gladman and Sam Simpson; tests hold
// them against the tables of the cipher's definition.
var sboxes = [8]func(a, b, c, d uint32) (uint32, uint32, uint32, uint32){
	sbox0, sbox1, sbox2, sbox3, sbox4, sbox5, sbox6, sbox7,
}

var unsboxes = [8]func(a, b, c, d uint32) (uint32, uint32, uint32, uint32){
	unsbox0, unsbox1, unsbox2, unsbox3, unsbox4, unsbox5, unsbox6, unsbox7,
}

func sbox0(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ d
	f := c ^ e
	z = a&d ^ b ^ f
	g := a ^ b&e
	y = b ^ f ^ (c | g)
	h := z & (f ^ g)
	return h ^ ^g, ^f ^ h, y, z
}

func unsbox0(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ b
	f := d ^ (^a | e)
	g := c ^ f
	y = e ^ g
	h := ^a ^ d&e
	x = f ^ y&h
	z = a&f ^ (g | x)
	return z ^ g ^ h, x, y, z
}

func sbox1(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ ^a
	f := c ^ (a | e)
	y = d ^ f
	g := b ^ (d | e)
	h := e ^ y
	z = h ^ f&g
	i := f ^ g
	return f ^ h&i, z ^ i, y, z
}

func unsbox1(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ d
	f := a ^ b&e
	g := e ^ f
	z = c ^ g
	h := b ^ e&f
	x = f ^ (z | h)
	i := z ^ h
	return ^x ^ i, x, g ^ (^x | i), z
}

func sbox2(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ d
	w = e ^ c&^a
	f := c ^ ^a
	g := b & (c ^ w)
	z = f ^ g
	y = a ^ (d|g)&(w|f)
	return w, e ^ z ^ y ^ (d | ^a), y, z
}

func unsbox2(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ d
	f := a ^ c
	g := c ^ e
	w = f ^ b&g
	z = e ^ (f | (d ^ (a | ^e)))
	h := w | z
	return w, ^g ^ h, d&^g ^ f ^ h, z
}

func sbox3(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ b
	f := c ^ d
	g := a | d
	h := a&c | e&g
	y = f ^ h
	i := h ^ b ^ g
	w = e ^ f&i
	j := y & w
	return w, i ^ j, y, (b | d) ^ f ^ j
}

func unsbox3(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ c
	f := a ^ b&e
	g := d | f
	w = e ^ g
	h := d ^ (e | g)
	y = c ^ f ^ h
	i := (a | b) ^ h
	z = f ^ w&i
	return w, z ^ w ^ i, y, z
}

func sbox4(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ d
	f := c ^ d&e
	g := b | f
	z = e ^ g
	w = f ^ (e | ^b)
	h := e ^ ^b
	y = a&w ^ g&h
	return w, a ^ f ^ h&y, y, z
}

func unsbox4(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ a&(c|d)
	f := c ^ a&e
	x = d ^ f
	z = e ^ f&x
	g := d ^ (x | ^a)
	return z ^ g, x, e&g ^ x ^ ^a, z
}

func sbox5(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ b
	f := a ^ d
	w = c ^ ^a ^ (e | f)
	g := d & w
	x = g ^ e ^ w
	h := f ^ (^a | w)
	return w, x, (e | g) ^ h, b ^ g ^ x&h
}

func unsbox5(a, b, c, d uint32) (w, x, y, z uint32) {
	e := d ^ b&^c
	f := a & e
	z = f ^ b ^ ^c
	g := b | z
	x = e ^ a&g
	h := a | d
	return h ^ ^c ^ g, x, b&h ^ (f | (a ^ c)), z
}

func sbox6(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ d
	f := b ^ e
	g := c ^ (^a | e)
	x = b ^ g
	h := d ^ (e | x)
	y = f ^ g&h
	i := g ^ h
	return y ^ i, x, y, ^g ^ f&i
}

func unsbox6(a, b, c, d uint32) (w, x, y, z uint32) {
	e := a ^ b
	f := c ^ e
	g := d ^ (c | ^a)
	x = f ^ g
	h := e ^ f&g
	z = g ^ (b | h)
	i := b | z
	return h ^ i, x, d&^a ^ f ^ i, z
}

func sbox7(a, b, c, d uint32) (w, x, y, z uint32) {
	e := b ^ c
	f := d ^ c&e
	g := a ^ f
	x = b ^ g&(d|e)
	z = e ^ a&g
	h := g ^ (f | x)
	y = f ^ z&h
	return ^h ^ z&y, x, y, z
}

func unsbox7(a, b, c, d uint32) (w, x, y, z uint32) {
	e := c | a&b
	f := d & (a | b)
	z = e ^ f
	g := b ^ f
	x = a ^ (g | (z ^ ^d))
	w = c ^ g ^ (d | x)
	return w, x, e ^ x ^ w ^ a&z, z
}
