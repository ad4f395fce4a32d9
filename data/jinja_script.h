// The helper program in Python as text (data/jinja_helper.py), compiled in, so that the program
// needs no file beside it.
#pragma once

namespace sala::data {

extern const char kJinjaHelperScript[];

}  // namespace sala::data
