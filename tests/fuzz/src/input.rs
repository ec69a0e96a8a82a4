//! Taking an input apart.

/// The rest of an input. What is taken past its end is zero, or nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `length` bytes.
    pub(crate) fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// One of `choices`, by a byte.
    pub(crate) fn choice<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        let index = usize::from(self.u8()).checked_rem(choices.len())?;
        choices.get(index).copied()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        for (to, from) in array.iter_mut().zip(self.bytes(N)) {
            *to = *from;
        }
        array
    }
}

/// The same for whoever must not borrow it.
#[derive(Debug)]
pub(crate) struct Owned {
    bytes: Vec<u8>,
    position: usize,
}

impl Owned {
    pub(crate) fn new(bytes: &[u8]) -> Owned {
        Owned { bytes: bytes.to_vec(), position: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.position >= self.bytes.len()
    }

    pub(crate) fn take<T>(&mut self, take: impl FnOnce(&mut Input<'_>) -> T) -> T {
        let mut input = Input::new(self.bytes.get(self.position..).unwrap_or_default());
        let taken = take(&mut input);
        self.position = self.bytes.len() - input.rest().len();
        taken
    }
}
