//! The pool alone: words, classes, holds, refills.
