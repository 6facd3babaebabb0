package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// parseArguments makes a command's arguments of the words behind it: KEY=VALUE each, or one JSON
// object. It returns nil if there are none.
func parseArguments(words []string) (any, error) {
	if len(words) == 0 {
		return nil, nil
	}
	if len(words) == 1 && strings.HasPrefix(words[0], "{") {
		if !json.Valid([]byte(words[0])) {
			return nil, fmt.Errorf("'%s' is not valid JSON", words[0])
		}
		return json.RawMessage(words[0]), nil
	}
	root := map[string]any{}
	for _, w := range words {
		key, text, ok := strings.Cut(w, "=")
		if !ok {
			return nil, fmt.Errorf("'%s' is not of the form KEY=VALUE", w)
		}
		if err := put(root, key, text); err != nil {
			return nil, err
		}
	}
	return listify(root, "")
}

// put stores a value under a dotted key, making the objects on the way.
func put(root map[string]any, key, text string) error {
	parts := strings.Split(key, ".")
	cur := root
	for i, p := range parts[:len(parts)-1] {
		sub, ok := cur[p]
		if !ok {
			sub = map[string]any{}
			cur[p] = sub
		}
		if cur, ok = sub.(map[string]any); !ok {
			return fmt.Errorf("'%s' has both a value and members", strings.Join(parts[:i+1], "."))
		}
	}
	last := parts[len(parts)-1]
	if last == "" {
		return fmt.Errorf("'%s=' has no name", key)
	}
	switch _, isObject := cur[last].(map[string]any); {
	case isObject:
		return fmt.Errorf("'%s' has both a value and members", key)
	case cur[last] != nil:
		return fmt.Errorf("'%s' is given twice", key)
	}
	if json.Valid([]byte(text)) {
		cur[last] = json.RawMessage(text)
	} else {
		cur[last] = text
	}
	return nil
}

// listify turns objects whose names are 0, 1, ... into lists, innermost first. path is the dotted
// key of m.
func listify(m map[string]any, path string) (any, error) {
	numbers := 0
	for k, v := range m {
		if _, err := strconv.ParseUint(k, 10, 31); err == nil {
			numbers++
		}
		if sub, ok := v.(map[string]any); ok {
			l, err := listify(sub, strings.TrimPrefix(path+"."+k, "."))
			if err != nil {
				return nil, err
			}
			m[k] = l
		}
	}
	if numbers == 0 || path == "" {
		return m, nil
	}
	list := make([]any, len(m))
	for i := range list {
		v, ok := m[strconv.Itoa(i)]
		if !ok {
			return nil, fmt.Errorf("the list '%s' has no '%s.%d'", path, path, i)
		}
		list[i] = v
	}
	return list, nil
}
