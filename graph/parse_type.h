// Reading dims, shapes and types from a Lexer: the pieces that Dim::parse, parse_type and the
// graph's parser share.
//
// Tested by graph_test, filetests/parse.
#pragma once

#include "graph/lexer.h"
#include "graph/type.h"

namespace tilewright::graph {

// Errors here have no line number; the caller adds it.
Result<Dim> read_dim(Lexer& lexer);
Result<Shape> read_shape(Lexer& lexer);  // [b, s, 64]
Result<Type> read_type(Lexer& lexer);

}  // namespace tilewright::graph
