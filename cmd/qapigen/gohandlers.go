package main

import (
	"fmt"
	"strings"

	"qblockd/schema/model"
)

// handlers writes the handler interface of each module and its registration.
func (g *generator) handlers() {
	var order []string
	by := map[string][]*model.Command{}
	for _, c := range g.Commands {
		m := handlerModule(c)
		if by[m] == nil {
			order = append(order, m)
		}
		by[m] = append(by[m], c)
	}
	for _, m := range order {
		var w text
		name := camel(m)
		w.p("// %sHandler executes the commands of the module %s. Arguments are checked and never nil;", name, m)
		w.p("// an error's text is what the client reads.")
		w.p("type %sHandler interface {", name)
		for _, c := range by[m] {
			w.comment("\t", camel(c.Name)+" executes "+c.Name+": "+lowerFirst(c.Doc.Body))
			if c.Doc.Returns != "" {
				w.comment("\t", "It returns "+c.Doc.Returns+".")
			}
			w.p("\t%s", signature(c))
		}
		w.p("}\n")
		w.p("// Register%s registers all commands of the module with r.", name)
		w.p("func Register%s(r Registrar, h %sHandler) {", name, name)
		for _, c := range by[m] {
			g.register(&w, c)
		}
		w.p("}")
		g.write(strings.ReplaceAll(m, "-", "_")+"_handler.gen.go", "module "+m, &w)
	}
}

func signature(c *model.Command) string {
	args := "ctx context.Context"
	if c.Arg != nil {
		args += ", a *" + typeName(c.Arg)
	}
	switch {
	case c.Ret == nil:
		return fmt.Sprintf("%s(%s) error", camel(c.Name), args)
	case rawReplies[c.Name]:
		return fmt.Sprintf("%s(%s) (Raw, error)", camel(c.Name), args)
	}
	return fmt.Sprintf("%s(%s) (%s, error)", camel(c.Name), args, elemType(c.Ret))
}

func (g *generator) register(w *text, c *model.Command) {
	w.p("r.Handle(%q, func(ctx context.Context, args *value.Dict, out []byte) ([]byte, error) {", c.Name)
	call := "h." + camel(c.Name) + "(ctx"
	switch {
	case c.Arg == nil:
		w.p("if err := noArgs(args); err != nil {\nreturn nil, err\n}")
	case c.Arg.Implicit:
		w.p("a, err := Decode%s(args)\nif err != nil {\nreturn nil, err\n}", typeName(c.Arg))
		call += ", a"
	default:
		w.p("a, err := Decode%s(args, ModeQObject)\nif err != nil {\nreturn nil, err\n}", typeName(c.Arg))
		call += ", a"
	}
	call += ")"
	if c.Ret == nil {
		w.p("if err := %s; err != nil {\nreturn nil, err\n}\nreturn append(out, \"{}\"...), nil\n})", call)
		return
	}
	w.p("ret, err := %s\nif err != nil {\nreturn nil, err\n}", call)
	expr := strings.ReplaceAll(encode(c.Ret, "ret", "ret"), "(b,", "(out,")
	expr = strings.ReplaceAll(expr, ".AppendJSON(b)", ".AppendJSON(out)")
	if c.Ret.Kind == model.Array && (c.Ret.Elem.Kind == model.Object || c.Ret.Elem.Kind == model.Alternate) {
		expr = fmt.Sprintf("appendList(out, ret, func(b []byte, v *%s) []byte { return v.AppendJSON(b) })", typeName(c.Ret.Elem))
	}
	if rawReplies[c.Name] {
		expr = "append(out, ret...)"
	}
	w.p("return %s, nil\n})", expr)
}
