//! Doubly linked lists of u32 links that live inside the items, wherever those are. No allocation, O(1) everything.
//! Deliberately absent: ownership; the caller keeps each item in at most one list of a kind.

use std::marker::PhantomData;
use std::ops::IndexMut;

use crate::api::NIL;

/// The neighbours of an item in a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    prev: u32,
    next: u32,
}

impl Default for Link {
    fn default() -> Self {
        Link {
            prev: NIL,
            next: NIL,
        }
    }
}

/// An item that can be in a list of kind `K`.
pub(crate) trait Linked<K> {
    fn link(&self) -> &Link;
    fn link_mut(&mut self) -> &mut Link;
}

/// A list of kind `K`. The front is where [`List::push_front`] puts things.
#[derive(Debug)]
pub(crate) struct List<K> {
    front: u32,
    back: u32,
    len: u32,
    kind: PhantomData<K>,
}

impl<K> Default for List<K> {
    fn default() -> Self {
        List::new()
    }
}

impl<K> List<K> {
    pub(crate) const fn new() -> Self {
        List {
            front: NIL,
            back: NIL,
            len: 0,
            kind: PhantomData,
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn front(&self) -> Option<u32> {
        (self.front != NIL).then_some(self.front)
    }

    pub(crate) fn back(&self) -> Option<u32> {
        (self.back != NIL).then_some(self.back)
    }

    /// The item after `at`, towards the back.
    pub(crate) fn after<S: IndexMut<u32>>(&self, items: &S, at: u32) -> Option<u32>
    where
        S::Output: Linked<K>,
    {
        let next = items[at].link().next;
        (next != NIL).then_some(next)
    }

    pub(crate) fn push_front<S: IndexMut<u32>>(&mut self, items: &mut S, at: u32)
    where
        S::Output: Linked<K>,
    {
        *items[at].link_mut() = Link {
            prev: NIL,
            next: self.front,
        };
        match self.front {
            NIL => self.back = at,
            front => items[front].link_mut().prev = at,
        }
        self.front = at;
        self.len += 1;
    }

    pub(crate) fn push_back<S: IndexMut<u32>>(&mut self, items: &mut S, at: u32)
    where
        S::Output: Linked<K>,
    {
        *items[at].link_mut() = Link {
            prev: self.back,
            next: NIL,
        };
        match self.back {
            NIL => self.front = at,
            back => items[back].link_mut().next = at,
        }
        self.back = at;
        self.len += 1;
    }

    /// Takes `at` out; it must be in this list.
    pub(crate) fn remove<S: IndexMut<u32>>(&mut self, items: &mut S, at: u32)
    where
        S::Output: Linked<K>,
    {
        let Link { prev, next } = std::mem::take(items[at].link_mut());
        match prev {
            NIL => self.front = next,
            prev => items[prev].link_mut().next = next,
        }
        match next {
            NIL => self.back = prev,
            next => items[next].link_mut().prev = prev,
        }
        self.len -= 1;
    }

    /// All items, front first. For checks and small lists.
    pub(crate) fn all<S: IndexMut<u32>>(&self, items: &S) -> Vec<u32>
    where
        S::Output: Linked<K>,
    {
        let mut found = Vec::with_capacity(self.len as usize);
        let mut at = self.front();
        while let Some(id) = at {
            assert!(
                found.len() < self.len as usize,
                "a list is longer than it says"
            );
            found.push(id);
            at = self.after(items, id);
        }
        assert_eq!(
            found.len(),
            self.len as usize,
            "a list is shorter than it says"
        );
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slab::Slab;

    #[derive(Default)]
    struct Item(Link);
    struct Test;
    impl Linked<Test> for Item {
        fn link(&self) -> &Link {
            &self.0
        }
        fn link_mut(&mut self) -> &mut Link {
            &mut self.0
        }
    }

    #[test]
    fn order_is_kept_from_both_ends() {
        let mut items: Slab<Item, 4> = Slab::new();
        let ids: Vec<u32> = (0..5).map(|_| items.insert(Item::default())).collect();
        let mut list: List<Test> = List::new();
        assert_eq!((list.front(), list.back()), (None, None));
        list.push_back(&mut items, ids[1]);
        list.push_back(&mut items, ids[2]);
        list.push_front(&mut items, ids[0]);
        list.push_back(&mut items, ids[3]);
        assert_eq!(list.all(&items), [0, 1, 2, 3]);
        list.remove(&mut items, 1);
        list.remove(&mut items, 3);
        list.remove(&mut items, 0);
        assert_eq!(
            (list.all(&items), list.front(), list.back()),
            (vec![2], Some(2), Some(2))
        );
        list.remove(&mut items, 2);
        assert_eq!((list.len(), list.front()), (0, None));
    }
}
